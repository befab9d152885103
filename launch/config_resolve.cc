// What follows from several keys together.
#include <fmt/format.h>

#include <algorithm>

#include "core/base/error.h"
#include "launch/config.h"
#include "models/presets.h"
#include "parallel/sequence_attention.h"

namespace shoal {
namespace {

template <class T, class U>
void FillIn(std::optional<T>* value, const U& otherwise) {
  if (!*value) *value = otherwise;
}

ModelConfig FamilyDefaults(const std::string& family, const ModelSection& given) {
  ModelConfig base;
  base.family = family;
  base.layers = 8;
  base.d_model = given.d_model.value_or(512);
  base.heads = std::max<int64_t>(1, base.d_model / 64);
  base.mlp = family == "gpt2" ? 4 * base.d_model : (base.d_model * 8 / 3 + 31) / 32 * 32;
  base.tied = family == "gpt2";
  return base;
}

// The divisors of n around d, for the advice in an error.
std::string DivisorsNear(int64_t n, int64_t d) {
  int64_t below = std::min(d, n), above = d;
  while (n % below != 0) --below;
  while (above < n && n % above != 0) ++above;
  return above > n || above == below ? fmt::format("{}", below)
                                     : fmt::format("{} or {}", below, std::min(above, n));
}

std::string MultiplesNear(int64_t n, int64_t d) {
  const int64_t below = n / d * d;
  return below == 0 ? fmt::format("{}", d) : fmt::format("{} or {}", below, below + d);
}

// The fields of ModelSection beside those of ModelConfig, in one place.
template <class Visit>
void ForEachSize(ModelSection& m, ModelConfig& c, Visit&& visit) {
  visit("layers", m.layers, c.layers);
  visit("d_model", m.d_model, c.d_model);
  visit("heads", m.heads, c.heads);
  visit("kv_heads", m.kv_heads, c.kv_heads);
  visit("head_dim", m.head_dim, c.head_dim);
  visit("mlp", m.mlp, c.mlp);
  visit("vocab", m.vocab, c.vocab);
  visit("context", m.context, c.context);
  visit("tied", m.tied, c.tied);
  visit("rope_theta", m.rope_theta, c.rope_theta);
  visit("norm_eps", m.norm_eps, c.norm_eps);
  visit("dropout", m.dropout, c.dropout);
  visit("attention_dropout", m.attention_dropout, c.attention_dropout);
}

std::string Family(const ModelSection& m) {
  return m.preset ? FindPreset(*m.preset)->family : m.family.value_or("");
}

void CheckLength(const Config& config) {
  const ModelSection& m = config.model;
  if (m.context && config.data.sequence_length > *m.context)
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "data.sequence_length {} is longer than the model's context {}: make the sequences "
               "shorter or set model.context to {}",
               config.data.sequence_length, *m.context, config.data.sequence_length);
}

}  // namespace

void ResolveModel(Config* config, int64_t vocab) {
  ModelSection& m = config->model;
  if (m.preset && (m.family || m.from))
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "model.preset and model.{} exclude each other: a preset names the family and all "
               "sizes, weights bring their own",
               m.family ? "family" : "from");
  if (!m.preset && !m.family && !m.from)
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "a model is required: set model.preset to a known shape ({}, ...), model.family to "
               "\"llama\" or \"gpt2\", or model.from to weights",
               PresetNames().front());
  if (!m.from) {
    const bool resized = m.d_model || m.heads || m.head_dim;
    const ModelConfig base = m.preset ? *FindPreset(*m.preset) : FamilyDefaults(*m.family, m);
    const bool grouped = m.preset && base.kv_heads != base.heads;
    FillIn(&m.layers, base.layers);
    FillIn(&m.d_model, base.d_model);
    FillIn(&m.heads, base.heads);
    FillIn(&m.kv_heads, grouped ? base.kv_heads : *m.heads);
    if (!m.head_dim) {
      if (*m.d_model % *m.heads != 0)
        SHOAL_FAIL(ErrorKind::kConfig, "config",
                   "model.heads {} does not divide model.d_model {}: set heads to {}, or give "
                   "model.head_dim",
                   *m.heads, *m.d_model, DivisorsNear(*m.d_model, *m.heads));
      m.head_dim = m.preset && !resized ? base.head_dim : *m.d_model / *m.heads;
    }
    FillIn(&m.mlp, base.mlp);
    if (base.vocab > 0) FillIn(&m.vocab, base.vocab);
    // RoPE has no table: a llama preset is as long as its sequences if they are longer.
    const int64_t length = config->data.sequence_length;
    FillIn(&m.context,
           base.family == "gpt2" && m.preset ? base.context : std::max(base.context, length));
    FillIn(&m.tied, base.tied);
    FillIn(&m.dropout, base.dropout);
    FillIn(&m.attention_dropout, base.attention_dropout);
    FillIn(&m.rope_theta, base.rope_theta);
    FillIn(&m.norm_eps, base.norm_eps);
  }
  if (vocab > 0 && !m.from) FillIn(&m.vocab, vocab);
  if (vocab > 0 && m.vocab && *m.vocab < vocab)
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "model.vocab {} is smaller than the {} ids of the tokenizer: set model.vocab to {} "
               "or more",
               *m.vocab, vocab, vocab);
  CheckLength(*config);
  if (m.layers && m.context) {
    Config checked = *config;
    FillIn(&checked.model.vocab, 1);  // may come with the data
    if (!m.from) CheckModelConfig(ModelShape(checked));
  }
}

void ResolveModelFrom(Config* config, const ModelConfig& weights) {
  ModelSection& m = config->model;
  SHOAL_CHECK(m.from, "config", "model.from is not set");
  const auto contradict = [&](const std::string& name, const auto& said, const auto& found) {
    SHOAL_FAIL(
        ErrorKind::kConfig, "config",
        "model.{} is {} in the configuration, but {} in the weights of {}: leave the key out", name,
        said, found, *m.from);
  };
  if (m.family && *m.family != weights.family) contradict("family", *m.family, weights.family);
  m.family = weights.family;
  ModelConfig found = weights;
  ForEachSize(m, found, [&](const std::string& name, auto& said, auto& value) {
    // Dropout is how to train, not what the weights are; a context may be cut, not extended.
    const bool free = name.ends_with("dropout") || (name == "context" && said && *said <= value);
    if (said && *said != value && !free) contradict(name, *said, value);
    FillIn(&said, value);
  });
  CheckLength(*config);
  CheckModelConfig(ModelShape(*config));
}

ModelConfig ModelShape(const Config& config) {
  ModelSection m = config.model;
  ModelConfig shape;
  shape.family = Family(m);
  ForEachSize(m, shape, [&](const std::string& name, auto& said, auto& value) {
    if (!said)
      SHOAL_FAIL(ErrorKind::kConfig, "config", "model.{} is not known: {}", name,
                 name == "vocab" ? "files of token ids do not say how many there are; set it"
                                 : "the weights under model.from have not been read");
    value = *said;
  });
  return shape;
}

BatchPlan CheckBatch(const Config& config, int64_t ranks) {
  const MeshConfig& mesh = config.mesh;
  const int64_t inner = mesh.tp * mesh.pp * mesh.cp;
  const std::string product = fmt::format("tp {} x pp {} x cp {}", mesh.tp, mesh.pp, mesh.cp);
  if (ranks % inner != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "mesh", "{} rank{} cannot be shared by {}: start {} ranks",
               ranks, ranks == 1 ? "" : "s", product, MultiplesNear(ranks, inner));
  BatchPlan plan;
  plan.dp = mesh.dp.value_or(ranks / inner);
  if (plan.dp * inner != ranks)
    SHOAL_FAIL(ErrorKind::kConfig, "mesh",
               "dp {} x {} makes {} ranks, but there are {}: start {}, or leave mesh.dp out",
               plan.dp, product, plan.dp * inner, ranks, plan.dp * inner);
  if (plan.dp % mesh.ep != 0 && (plan.dp * mesh.cp) % mesh.ep != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "mesh",
               "mesh.ep {} does not divide the {} replicas: set it to {}", mesh.ep, plan.dp,
               DivisorsNear(plan.dp, mesh.ep));
  if (config.zero.shard_ranks) {
    const int64_t shard = *config.zero.shard_ranks, data = plan.dp * mesh.cp;
    if (data % shard != 0)
      SHOAL_FAIL(ErrorKind::kConfig, "zero",
                 "zero.shard_ranks {} does not divide the {} ranks that share parameters: set it "
                 "to {}, or leave it out",
                 shard, data, DivisorsNear(data, shard));
    if (config.zero.stage == 0)
      SHOAL_FAIL(ErrorKind::kConfig, "zero",
                 "zero.shard_ranks {} shares nothing at zero.stage 0: set zero.stage to 1, 2 or 3",
                 shard);
  }
  if (config.sequence.schedule == "hybrid")
    HybridGroups(static_cast<int>(mesh.cp), config.sequence.ulysses);
  else if (config.sequence.ulysses != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "sequence",
               "sequence.ulysses {} is of sequence.schedule \"hybrid\", not of \"{}\": leave it "
               "out, or set the schedule to \"hybrid\"",
               config.sequence.ulysses, config.sequence.schedule);
  const int64_t sequences = config.batch.sequences;
  if (sequences < plan.dp)
    SHOAL_FAIL(ErrorKind::kConfig, "batch",
               "more ranks than sequences: {} data-parallel replicas share batch.sequences {}. "
               "Start at most {} ranks, or set batch.sequences to {}",
               plan.dp, sequences, sequences * inner, MultiplesNear(sequences, plan.dp));
  if (sequences % plan.dp != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "batch",
               "batch.sequences {} is not divisible by {} data-parallel replicas: set it to {}",
               sequences, plan.dp, MultiplesNear(sequences, plan.dp));
  plan.per_replica = sequences / plan.dp;
  plan.micro = config.batch.micro.value_or(plan.per_replica);
  if (plan.per_replica % plan.micro != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "batch",
               "batch.micro {} does not divide the {} sequences of a replica (batch.sequences {} / "
               "dp {}): set batch.micro to {}, or batch.sequences to {}",
               plan.micro, plan.per_replica, sequences, plan.dp,
               DivisorsNear(plan.per_replica, plan.micro),
               MultiplesNear(sequences, plan.dp * plan.micro));
  plan.micro_batches = plan.per_replica / plan.micro;
  return plan;
}

void CheckSupported(const Config& config) {
  const PrecisionConfig& p = config.precision;
  if ((p.gradients == "bf16" && p.compute != "bf16") ||
      (p.gradients == "fp32" && p.compute == "fp64"))
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "precision.gradients \"{}\" is narrower than precision.compute \"{}\": leave it at "
               "\"auto\"",
               p.gradients, p.compute);
  if (config.memory.compress_activations == "bf16" && p.compute == "bf16")
    SHOAL_FAIL(
        ErrorKind::kConfig, "config",
        "memory.compress_activations = \"bf16\" saves nothing where precision.compute is bf16: "
        "leave it out, or set it to \"int8\"");
  if (config.optim.in_backward && (config.optim.clip > 0 || config.optim.non_finite != "halt"))
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "optim.in_backward updates weights before the whole gradient is known, which "
               "optim.clip {} and optim.non_finite \"{}\" need: set optim.clip = 0 and "
               "optim.non_finite = \"halt\", or leave optim.in_backward out",
               config.optim.clip, config.optim.non_finite);
  if (config.optim.master == "split" && p.compute != "bf16")
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "optim.master = \"split\" is of weights in bf16, and precision.compute is \"{}\": "
               "leave it out",
               p.compute);
  if (config.zero.contiguous_gradients && (config.zero.stage < 2 || config.optim.in_backward))
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "zero.contiguous_gradients is of the shares that zero.stage 2 and 3 keep until an "
               "update after backward (here stage {}, optim.in_backward = {}): leave it out",
               config.zero.stage, config.optim.in_backward);
  const auto later = [](bool wanted, const std::string& what) {
    if (wanted)
      SHOAL_FAIL(ErrorKind::kConfig, "config", "{}: this version of Shoal does not have it yet",
                 what);
  };
  later(config.mesh.ep > 1, fmt::format("mesh.ep = {}", config.mesh.ep));
  later(config.method.name != "full", fmt::format("method.name = \"{}\"", config.method.name));
  const CheckpointConfig& c = config.checkpoint;
  const int64_t validate = config.run.validate_every;
  if (c.keep_best && (validate == 0 || config.data.validation_fraction == 0 || c.every == 0 ||
                      c.every % validate != 0))
    SHOAL_FAIL(ErrorKind::kConfig, "config",
               "checkpoint.keep_best compares saves by their validation loss: set "
               "data.validation_fraction, and run.validate_every to {}",
               c.every == 0 ? "a divisor of checkpoint.every, which is to be set"
                            : DivisorsNear(c.every, std::max<int64_t>(validate, 1)));
}

}  // namespace shoal
