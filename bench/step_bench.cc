// Training steps on random tokens: our arm of bench/step_bench.py. Prints one JSON line.
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>

#include "bench/random_batch.h"
#include "core/base/thread_count.h"
#include "kernels/matmul.h"
#include "launch/bootstrap.h"
#include "launch/config.h"
#include "launch/session.h"
#include "models/presets.h"

namespace {

using namespace shoal;  // NOLINT: a program
using Clock = std::chrono::steady_clock;

double Since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The best of several products of a size that every library likes.
double GemmGflops(DType dtype) {
  constexpr int64_t kM = 1024, kK = 768, kN = 3072;
  const Tensor a = Tensor::Full({kM, kK}, dtype, 0.5), b = Tensor::Full({kN, kK}, dtype, 0.25);
  const Tensor d = Tensor::Empty({kM, kN}, dtype);
  const Stream& stream = ExecutionContext::Current().stream();
  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    const auto begin = Clock::now();
    kernels::Matmul(stream, d.view(), a.view(), b.view().Transposed(), {}, 0);
    ExecutionContext::Current().Synchronize();
    best = std::min(best, Since(begin));
  }
  return 2.0 * kM * kK * kN / best / 1e9;
}

struct Options {
  std::string model = "llama-60m", precision = "fp32", recompute = "none", activations_dir;
  std::string offload_dir, compress = "none";
  int64_t batch = 4, length = 256, micro_batches = 1, mlp_chunk_rows = 0;
  double attention_dropout = 0;
  int threads = 0, steps = 10, warmup = 2, tp = 1, cp = 1, zero_stage = 0;
  int64_t bucket_bytes = ZeroOptions().bucket_bytes;
  bool in_backward = false, split_master = false, partition_activations = false;
  RunOptions run;
};

int Measure(const Options& o, Communicator& communicator) {
  Config config;
  config.precision.compute = o.precision;
  BatchPlan plan;
  plan.micro_batches = o.micro_batches;
  const ModelConfig* preset = FindPreset(o.model);
  if (preset == nullptr) SHOAL_FAIL(ErrorKind::kConfig, "bench", "no preset {}", o.model);
  TrainingOptions training;
  training.model = *preset;
  training.model.context = std::max(preset->context, o.length);
  training.model.attention_dropout = o.attention_dropout;
  training.mlp_chunk_rows = o.mlp_chunk_rows;
  training.compute = ComputeDType(config);
  training.gradients = o.micro_batches * communicator.size() > 1
                           ? AccumulatorDType(training.compute)
                           : training.compute;
  training.rule.weight_decay = 0.1;
  training.update_in_backward = o.in_backward;
  training.split_master = o.split_master;
  training.clip = o.in_backward ? 0 : 1;
  training.compress_activations = ParseActivationFormat(o.compress);
  training.mesh = {.dp = 0, .tp = o.tp, .cp = o.cp};
  training.sequence.tokens = training.length = o.length;
  training.zero_stage = o.zero_stage;
  training.bucket_bytes = o.bucket_bytes;
  training.offload_dir = o.offload_dir;
  training.activations_dir = o.activations_dir;
  training.partition_activations = o.partition_activations;
  if (o.recompute != "none") training.recompute = RecomputeEvery(o.recompute == "full", training);
  if (o.threads > 0) SetKernelThreads(std::max(1, o.threads / communicator.size()));
  TrainingStep step(training, communicator);
  const Communicator& data = step.mesh().axis(MeshAxis::kDp);
  const int64_t share = o.batch / data.size() / o.micro_batches;
  std::vector<Batch> batches;
  for (int64_t i = 0; i < o.micro_batches; ++i) {
    batches.push_back(RandomBatch(share, o.length, training.model.vocab,
                                  static_cast<uint32_t>(data.rank() * 1000 + i)));
  }
  std::vector<double> seconds;
  KernelProfile profile;
  for (int i = 0; i < o.warmup + o.steps; ++i) {
    if (i == o.warmup) {
      ExecutionContext::Current().set_profile(&profile);
      step.set_profile(&profile);
    }
    const auto begin = Clock::now();
    step.Run(batches, 1e-4);
    ExecutionContext::Current().Synchronize();
    if (i >= o.warmup) seconds.push_back(Since(begin));
  }
  ExecutionContext::Current().set_profile(nullptr);
  step.set_profile(nullptr);
  double all = 0;
  for (double s : seconds) all += s;
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const double gemm = GemmGflops(training.compute);
  if (communicator.rank() != 0) return 0;
  std::sort(seconds.begin(), seconds.end());
  const double tokens = static_cast<double>(o.batch * o.length);
  const MemoryStats memory = ExecutionContext::Current().allocator()->stats();
  nlohmann::ordered_json json = {
      {"model", o.model},
      {"batch", o.batch},
      {"sequence_length", o.length},
      {"precision", o.precision},
      {"threads", KernelThreads() * communicator.size()},
      {"ranks", communicator.size()},
      {"tokens_per_second", tokens / seconds[seconds.size() / 2]},
      {"tokens_per_second_best", tokens / seconds[0]},
      {"peak_rss_mb", static_cast<double>(usage.ru_maxrss) / 1024},
      {"allocator_peak_mb", static_cast<double>(memory.peak_total) / (1 << 20)},
      {"gemm_gflops", gemm}};
  for (int c = 0; c < kMemoryClasses; ++c)
    json["peak_mb"][Name(static_cast<MemoryClass>(c))] =
        static_cast<double>(memory.peak[static_cast<size_t>(c)]) / (1 << 20);
  for (const auto& [name, s] : profile.parts()) json["percent"][name] = 100 * s / all;
  json["percent"]["host"] = 100 * (all - profile.total()) / all;
  std::cout << json.dump() << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app("Training steps on random tokens");
  app.add_option("--model", o.model);
  app.add_option("--batch", o.batch);
  app.add_option("--sequence-length", o.length);
  app.add_option("--precision", o.precision)->check(CLI::IsMember({"fp32", "bf16", "fp64"}));
  app.add_option("--micro-batches", o.micro_batches);
  app.add_option("--threads", o.threads, "over all ranks; 0: all cores");
  app.add_option("--steps", o.steps)->check(CLI::PositiveNumber);
  app.add_option("--warmup", o.warmup);
  app.add_option("--tp", o.tp);
  app.add_option("--cp", o.cp);
  app.add_option("--recompute", o.recompute)->check(CLI::IsMember({"none", "selective", "full"}));
  app.add_option("--activations-dir", o.activations_dir, "of a file for them");
  app.add_option("--mlp-chunk-rows", o.mlp_chunk_rows, "0: all at once");
  app.add_option("--attention-dropout", o.attention_dropout);
  app.add_flag("--partition-activations", o.partition_activations, "over tp");
  app.add_option("--offload-dir", o.offload_dir, "of a file for the optimizer's states");
  app.add_option("--bucket-bytes", o.bucket_bytes, "of gradients that are exchanged together");
  app.add_option("--compress", o.compress)->check(CLI::IsMember({"none", "bf16", "int8"}));
  app.add_flag("--split-master", o.split_master, "of bf16 parameters");
  app.add_flag("--in-backward", o.in_backward, "updates; without clipping");
  app.add_option("--zero-stage", o.zero_stage);
  app.add_option("--local-ranks", o.run.local_ranks);
  app.add_option("--device", o.run.device);
  CLI11_PARSE(app, argc, argv);
  return RunRanks(o.run, [&](Communicator& communicator) { return Measure(o, communicator); });
}
