// The configuration of a run: plain structs, read strictly from TOML and from a.b=v on the command
// line. The names are the contract of the program (docs/design.md, section 5); the table in
// config_schema.cc gives each its type, range and help, and the initialisers here its default.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/config.h"

namespace shoal {

struct RunConfig {
  std::string dir;
  int64_t steps = 0;
  int64_t seed = 1;
  int64_t validate_every = 0;                 // 0: never
  std::optional<int64_t> validate_sequences;  // left out: all of the tail
  int64_t log_every = 10;
  bool operator==(const RunConfig&) const = default;
};

// What was left out is filled from the preset or the family's defaults; with `from` it stays empty
// until ResolveModelFrom has seen the weights.
struct ModelSection {
  std::optional<std::string> preset, family, from;
  std::optional<int64_t> layers, d_model, heads, kv_heads, head_dim, mlp, vocab, context;
  std::optional<bool> tied;
  std::optional<double> dropout, attention_dropout, rope_theta, norm_eps;
  bool operator==(const ModelSection&) const = default;
};

struct DataConfig {
  std::string path;
  std::string tokenizer = "bytes";
  int64_t sequence_length = 0;
  double validation_fraction = 0.0;
  bool documents = false;
  bool binary = false;
  bool operator==(const DataConfig&) const = default;
};

struct BatchConfig {
  int64_t sequences = 0;         // per optimizer step, over all ranks
  std::optional<int64_t> micro;  // per data-parallel replica and pass; left out: all of them
  bool operator==(const BatchConfig&) const = default;
};

struct OptimConfig {
  std::string name;
  double lr = 0.0;
  std::array<double, 2> betas = {0.9, 0.95};
  double eps = 1e-8;
  double weight_decay = 0.0;
  double momentum = 0.0;
  double clip = 1.0;  // 0: never
  std::string schedule = "cosine";
  int64_t warmup_steps = 0;
  double min_lr_fraction = 0.1;
  double decay_fraction = 0.2;
  std::string non_finite = "halt";
  bool in_backward = false;
  std::string master = "whole";
  bool operator==(const OptimConfig&) const = default;
};

struct MeshConfig {
  std::optional<int64_t> dp;  // left out: fills the world
  int64_t tp = 1, pp = 1, cp = 1, ep = 1;
  bool sequence_parallel = false;
  bool operator==(const MeshConfig&) const = default;
};

struct ZeroConfig {
  int64_t stage = 0;
  std::optional<int64_t> shard_ranks;  // left out: all that share parameters
  int64_t bucket = int64_t{8} << 20;   // bytes
  bool contiguous_gradients = false;
  std::string offload = "none";
  std::optional<std::string> offload_dir;  // left out: on the disk of run.dir
  bool operator==(const ZeroConfig&) const = default;
};

struct PipelineConfig {
  std::string schedule = "1f1b";
  std::optional<int64_t> virtual_stages;
  std::optional<std::vector<int64_t>> blocks;  // of each stage; left out: balanced
  bool operator==(const PipelineConfig&) const = default;
};

struct SequenceConfig {
  std::string schedule = "auto";
  std::string layout = "zigzag";
  int64_t ulysses = 0;  // of hybrid: ranks that exchange heads; 0: chosen
  bool operator==(const SequenceConfig&) const = default;
};

struct PrecisionConfig {
  std::string compute = "fp32";
  std::string gradients = "auto";
  bool operator==(const PrecisionConfig&) const = default;
};

struct MemoryConfig {
  std::string recompute = "none";
  std::optional<int64_t> budget;  // bytes
  bool overcommit = false;
  std::string offload_activations = "none";
  std::string compress_activations = "none";
  bool partition_activations = false;
  int64_t mlp_chunk_rows = 0;  // 0: all
  bool operator==(const MemoryConfig&) const = default;
};

struct MethodConfig {
  std::string name = "full";
  bool operator==(const MethodConfig&) const = default;
};

struct CheckpointConfig {
  int64_t every = 0;  // 0: only at the end
  int64_t keep = 2;
  int64_t keep_every = 0;  // 0: none
  bool keep_best = false;
  bool async = true;
  int64_t staging = int64_t{256} << 20;  // bytes
  double full_disk_wait = 600;           // seconds
  bool operator==(const CheckpointConfig&) const = default;
};

struct Config {
  RunConfig run;
  ModelSection model;
  DataConfig data;
  BatchConfig batch;
  OptimConfig optim;
  MeshConfig mesh;
  ZeroConfig zero;
  PipelineConfig pipeline;
  SequenceConfig sequence;
  PrecisionConfig precision;
  MemoryConfig memory;
  MethodConfig method;
  CheckpointConfig checkpoint;
  bool operator==(const Config&) const = default;
};

// Reads a file and then the overrides ("optim.lr=1e-3": the value is TOML, or else a bare string).
// Every mistake found is listed in one Error(kConfig), each with file:line:column or the override.
// The result is resolved (see ResolveModel), and its paths but run.dir are absolute.
Config LoadConfig(const std::string& path, const std::vector<std::string>& overrides = {});
Config ParseConfig(std::string_view toml, std::string_view source_name,
                   const std::vector<std::string>& overrides = {});

// Every key with its value as TOML that ParseConfig reads back to an equal Config; a key without a
// value is a comment.
std::string WriteConfig(const Config& config);

// What a run prints when it starts: a line that says what it is, and every key that has its
// default, wrapped to `columns`.
std::string ConfigSummary(const Config& config, int64_t ranks, size_t columns = 100);

// "a.b=v" with a bare key on the left: an override and not the name of a file.
bool IsOverride(std::string_view argument);

// "6GiB" -> bytes; no value if it is no such text or no whole positive number of bytes.
std::optional<int64_t> ParseBytes(const std::string& text);

// One line per key: name, type, range, default and meaning.
std::string ConfigHelp();

// Fills what `model` leaves out and checks the sizes. `vocab` is the number of ids that the data's
// tokenizer can produce, 0 if unknown (files of ids): a model.vocab that was left out becomes it.
// Called by ParseConfig for what the file alone decides, and again once the data is open.
void ResolveModel(Config* config, int64_t vocab);
// After the weights under model.from have been found: takes over their shape; a size that the
// config states and the weights contradict is an error.
void ResolveModelFrom(Config* config, const ModelConfig& weights);
// The shape, once everything is known; Error(kConfig) that names what is still missing.
ModelConfig ModelShape(const Config& config);

// How a step's sequences fall onto `ranks` ranks.
struct BatchPlan {
  int64_t dp = 1;             // replicas
  int64_t per_replica = 1;    // sequences of a replica per optimizer step
  int64_t micro = 1;          // sequences of a replica per pass
  int64_t micro_batches = 1;  // passes per optimizer step
};
// Error(kConfig) with the numbers and the nearest that would do.
BatchPlan CheckBatch(const Config& config, int64_t ranks);

// Error(kConfig) that names the first key whose value this version does not have yet.
void CheckSupported(const Config& config);

}  // namespace shoal
