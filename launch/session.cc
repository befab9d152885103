#include "launch/session.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

#include "core/init.h"
#include "launch/bootstrap.h"
#include "launch/hugging_face.h"
#include "launch/run_directory.h"

namespace shoal {

namespace fs = std::filesystem;

OpenedData OpenData(Config* config) {
  OpenedData data;
  data.tokenizer = MakeTokenizer(config->data.tokenizer);
  CorpusOptions options;
  options.path = config->data.path;
  options.tokenizer = data.tokenizer.get();
  options.vocab = config->model.vocab.value_or(0);
  options.binary = config->data.binary;
  std::shared_ptr<const TokenSource> source = OpenCorpus(options);
  // Files of ids need no tokenizer, and the default one says nothing about them.
  ResolveModel(config, source->info().format == "text" ? data.tokenizer->vocab_size() : 0);
  data.fingerprint = Fingerprint(*source);
  LoaderOptions loader;
  loader.sequence_length = config->data.sequence_length;
  loader.validation_fraction = config->data.validation_fraction;
  loader.seed = static_cast<uint64_t>(config->run.seed);
  loader.documents = config->data.documents;
  data.loader = std::make_unique<Loader>(std::move(source), loader);
  return data;
}

DType ComputeDType(const std::string& precision) {
  if (precision == "fp64") return DType::kF64;
  if (precision == "bf16") return DType::kBF16;
  return DType::kF32;
}

DType ComputeDType(const Config& config) { return ComputeDType(config.precision.compute); }

namespace {

// `path`, or the nearest folder above it that is there.
std::string ExistingFolder(std::filesystem::path path) {
  std::error_code ignored;
  path = std::filesystem::absolute(path);
  while (path.has_relative_path() && !std::filesystem::is_directory(path, ignored))
    path = path.parent_path();
  return path;
}

}  // namespace

TrainingOptions MakeTrainingOptions(const Config& config, const BatchPlan& plan) {
  TrainingOptions options;
  options.model = ModelShape(config);
  options.compute = ComputeDType(config);
  // Shares of a gradient that are added up, over micro-batches or ranks, are held and exchanged in
  // f32. One pass on one rank is a single product per weight, accumulated in f32 inside, and may be
  // stored rounded.
  const bool shares = plan.micro_batches * plan.dp > 1;
  options.gradients = shares ? AccumulatorDType(options.compute) : options.compute;
  if (config.precision.gradients == "fp32" && options.compute == DType::kBF16)
    options.gradients = DType::kF32;
  if (config.precision.gradients == "bf16" && options.compute == DType::kBF16)
    options.gradients = DType::kBF16;
  options.rule.name = config.optim.name;
  options.rule.beta1 = config.optim.betas[0];
  options.rule.beta2 = config.optim.betas[1];
  options.rule.eps = config.optim.eps;
  options.rule.weight_decay = config.optim.weight_decay;
  options.rule.momentum = config.optim.momentum;
  options.clip = config.optim.clip;
  options.seed = static_cast<uint64_t>(config.run.seed);
  options.mesh = {.dp = static_cast<int>(plan.dp),
                  .tp = static_cast<int>(config.mesh.tp),
                  .pp = static_cast<int>(config.mesh.pp),
                  .cp = static_cast<int>(config.mesh.cp),
                  .ep = static_cast<int>(config.mesh.ep)};
  options.sequence_parallel = config.mesh.sequence_parallel;
  options.zero_stage = static_cast<int>(config.zero.stage);
  options.shard_ranks = static_cast<int>(config.zero.shard_ranks.value_or(0));
  options.bucket_bytes = config.zero.bucket;
  // A file has no name: it need not lie in run.dir, which is made last.
  const std::string files = config.zero.offload_dir.value_or(ExistingFolder(config.run.dir));
  options.update_in_backward = config.optim.in_backward;
  options.split_master = config.optim.master == "split";
  options.contiguous_gradients = config.zero.contiguous_gradients;
  options.offload_host = config.zero.offload == "host";
  if (config.zero.offload == "file") options.offload_dir = files;
  options.activations_host = config.memory.offload_activations == "host";
  if (config.memory.offload_activations == "file") options.activations_dir = files;
  options.compress_activations = ParseActivationFormat(config.memory.compress_activations);
  if (config.memory.recompute == "full" || config.memory.recompute == "selective")
    options.recompute = RecomputeEvery(config.memory.recompute == "full", options);
  options.partition_activations = config.memory.partition_activations;
  options.mlp_chunk_rows = config.memory.mlp_chunk_rows;
  if (config.sequence.schedule != "auto")
    options.sequence.schedule = ParseSequenceKind(config.sequence.schedule);
  options.sequence.ulysses = static_cast<int>(config.sequence.ulysses);
  options.sequence.layout = ParseSequenceLayout(config.sequence.layout);
  options.sequence.tokens = config.data.sequence_length;
  options.schedule = config.pipeline.schedule;
  options.virtual_stages = static_cast<int>(
      config.pipeline.virtual_stages.value_or(config.pipeline.schedule == "zb_v" ? 2 : 1));
  if (config.pipeline.blocks)
    options.blocks_per_stage.assign(config.pipeline.blocks->begin(), config.pipeline.blocks->end());
  options.micro_batches = static_cast<int>(plan.micro_batches);
  options.length = config.data.sequence_length;
  // These refuse what cannot be cut or ordered.
  Cut(options.model, options.mesh.tp);
  StagesOf(options);
  CheckPipelineSchedule(ScheduleOf(options, options.micro_batches));
  if (config.memory.recompute == "auto")
    ChooseRecompute(&options, PassOf(config, plan),
                    config.memory.budget.value_or(MemoryOfRank(options.mesh.ranks())));
  return options;
}

PassShape PassOf(const Config& config, const BatchPlan& plan) {
  return {plan.micro, config.data.documents};
}

int64_t MemoryOfRank(int ranks) {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE) / ranks;
}

int64_t MemoryOfRank(Communicator& communicator) {
  const std::vector<std::string> hosts = communicator.AllGatherStrings(communicator.host());
  return MemoryOfRank(static_cast<int>(std::ranges::count(hosts, communicator.host())));
}

void LimitMemory(int64_t bytes) {
  const ExecutionContext& context = ExecutionContext::Current();
  if (context.device().type == DeviceType::kCpu) context.allocator()->set_limit(bytes);
}

std::vector<Batch> StepBatches(const Config& config, const BatchPlan& plan, const Loader& loader,
                               int64_t step, int64_t replica) {
  std::vector<Batch> batches;
  for (int64_t i = 0; i < plan.micro_batches; ++i) {
    batches.push_back(loader.Train(step - 1, config.batch.sequences,
                                   replica * plan.per_replica + i * plan.micro, plan.micro));
  }
  return batches;
}

namespace {

// "RUN holds no valid save: all are damaged", and what is wrong with each.
[[noreturn]] void NoValidSave(const std::string& path, const std::vector<std::string>& reasons) {
  SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{} holds no valid save: {}{}", path,
             reasons.empty() ? "the run ended before its first" : "all are damaged\n",
             fmt::join(reasons, "\n"));
}

bool IsSave(const std::string& path) { return fs::exists(fs::path(path) / "manifest.json"); }

std::vector<std::string> Saves(const std::string& path, const Warn& warn,
                               std::vector<std::string>* reasons) {
  if (IsSave(path)) {
    CheckSave(path);
    return {path};
  }
  if (!fs::exists(path)) SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{} does not exist", path);
  if (IsHuggingFace(path)) return {path};
  std::vector<std::string> saves;
  for (const SaveEntry& save : ListSaves(RunDirectory::Attach(path).checkpoints_path())) {
    try {
      CheckSave(save.path);
      saves.push_back(save.path);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kStorage) throw;
      reasons->push_back(e.message());
      warn(e.message() + "; trying an older save");
    }
  }
  if (saves.empty()) NoValidSave(path, *reasons);
  return saves;
}

}  // namespace

std::vector<std::string> FindSaves(const std::string& path, const Warn& warn) {
  std::vector<std::string> reasons;
  return Saves(path, warn, &reasons);
}

std::string FindSave(const std::string& path, const Warn& warn) {
  std::vector<std::string> reasons;
  for (const std::string& save : FindSaves(path, warn)) {
    if (IsHuggingFace(save)) return save;
    try {
      VerifySave(save);
      return save;
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kStorage || save == path) throw;
      reasons.push_back(e.message());
      warn(e.message() + "; trying an older save");
    }
  }
  NoValidSave(path, reasons);
}

std::string LoadNewest(const std::string& path, Communicator& communicator, const Warn& warn,
                       const std::function<void(const std::string&)>& load) {
  // What rank 0 finds is what all try. No path holds a zero.
  constexpr std::string_view kEnd("\0", 1);
  std::vector<std::string> reasons;
  std::string found;
  Agree(communicator, [&] {
    if (communicator.rank() == 0)
      found = fmt::format("{}", fmt::join(Saves(path, warn, &reasons), kEnd));
  });
  std::istringstream saves(communicator.AllGatherStrings(found)[0]);
  for (std::string save; std::getline(saves, save, kEnd[0]);) {
    try {
      Agree(communicator, [&] { load(save); });
      return save;
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kStorage || save == path) throw;
      reasons.push_back(communicator.size() > 1
                            ? fmt::format("{} (found by rank {})", e.message(), e.rank())
                            : e.message());
      warn(reasons.back() + "; trying an older save");
    }
  }
  Agree(communicator, [&] { NoValidSave(path, reasons); });
  return "";
}

Config WeightsConfig(const ModelConfig& shape, const std::string& tokenizer, DType dtype) {
  Config config;
  config.model.from = "";
  ResolveModelFrom(&config, shape);
  config.model.from.reset();
  config.data.tokenizer = tokenizer;
  // There is no compute in f16.
  if (dtype == DType::kF64) config.precision.compute = "fp64";
  if (dtype == DType::kBF16) config.precision.compute = "bf16";
  return config;
}

LoadedModel LoadModel(const std::string& save, std::optional<DType> compute) {
  LoadedModel loaded;
  std::optional<HuggingFaceModel> theirs;
  if (IsHuggingFace(save)) {
    theirs.emplace(save);
    loaded.config = WeightsConfig(theirs->config(), theirs->tokenizer(), theirs->dtype());
  } else {
    const SaveInfo info = ReadSaveInfo(save);
    loaded.config = ParseConfig(info.config, save + "/manifest.json");
    if (info.data_fingerprint.empty()) {  // imported: what it says of data is made up
      loaded.config.data.path.clear();
      loaded.config.data.sequence_length = 0;
    }
  }
  loaded.model = BuildModel(ModelShape(loaded.config));
  for (const auto& p : loaded.model->Parameters())
    p->Materialize(compute.value_or(ComputeDType(loaded.config)));
  const StateDict weights = ModelState(*loaded.model);
  ReadOnHost(weights, [&](const StateDict& host) {
    if (theirs) {
      theirs->Load(host);
    } else {
      LoadState(save, host);
    }
  });
  return loaded;
}

void ResolveFrom(Config* config) {
  if (!config->model.from) return;
  const std::string save = FindSaves(*config->model.from, Ignore)[0];
  ResolveModelFrom(config, IsHuggingFace(save) ? HuggingFaceModel(save).config()
                                               : ModelShape(ParseConfig(ReadSaveInfo(save).config,
                                                                        save + "/manifest.json")));
}

void LoadWeights(Config* config, Communicator& communicator, const Warn& warn, TrainingStep& step) {
  if (!config->model.from) return;
  StateDict weights = step.State();
  std::erase_if(weights, [](const StateEntry& e) { return !e.name.starts_with("model/"); });
  config->model.from =
      LoadNewest(*config->model.from, communicator, warn, [&](const std::string& save) {
        ReadOnHost(weights, [&](const StateDict& host) {
          if (IsHuggingFace(save))
            HuggingFaceModel(save).Load(host);
          else
            LoadState(save, host);
        });
      });
}

Evaluation Evaluate(int64_t sequences, int64_t micro, Communicator& communicator,
                    const std::function<Batch(int64_t, int64_t)>& batch,
                    const std::function<double(const Batch&)>& sum_loss) {
  const int size = communicator.size();
  const int64_t begin = ShardBegin(sequences, communicator.rank(), size);
  const int64_t end = ShardBegin(sequences, communicator.rank() + 1, size);
  // Where ranks share parameters, all must make the same passes: who has nothing left repeats its
  // last sequence and does not count it.
  const int64_t longest = (sequences + size - 1) / size;
  double sum = 0, labelled = 0;
  for (int64_t done = 0; done < longest; done += micro) {
    const int64_t first = begin + done, count = std::min(micro, end - first);
    const Batch b = count > 0 ? batch(first, count) : batch(std::max<int64_t>(end - 1, 0), 1);
    const double loss = sum_loss(b);
    if (count <= 0) continue;
    sum += loss;
    labelled += static_cast<double>(b.labelled);
  }
  Evaluation result;
  sum = communicator.Sum(sum);
  result.tokens = static_cast<int64_t>(communicator.Sum(labelled));
  result.loss = sum / static_cast<double>(std::max<int64_t>(result.tokens, 1));
  return result;
}

}  // namespace shoal
