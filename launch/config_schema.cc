#include "launch/config_schema.h"

#include <fmt/format.h>

#include "models/presets.h"

namespace shoal {
namespace {

constexpr double kNoLimit = 1e15;  // still exact in a double, and so in JSON
constexpr double kSize = 1e9;      // of one dimension
constexpr double kDegree = 1e6;

class Key : public ConfigKey {
 public:
  Key(const char* section, const char* name, ConfigField (*field)(Config&), const char* help) {
    this->section = section;
    this->name = name;
    this->field = field;
    this->help = help;
  }
  Key&& In(double low, double high) && {
    this->low = low;
    this->high = high;
    return std::move(*this);
  }
  Key&& Below(double low, double high) && {
    below = true;
    return std::move(*this).In(low, high);
  }
  Key&& OneOf(std::vector<std::string> names) && {
    choices = std::move(names);
    return std::move(*this);
  }
  Key&& OrFile(const char* ending) && {
    suffix = ending;
    return std::move(*this);
  }
  Key&& Required() && {
    required = true;
    return std::move(*this);
  }
  Key&& Bytes() && { return std::move(*this).BytesFrom(1); }
  Key&& BytesFrom(double least) && {
    bytes = true;
    return std::move(*this).In(least, kNoLimit);
  }
  Key&& LeftOut(const char* meaning) && {
    left_out = meaning;
    return std::move(*this);
  }
};

#define KEY(section, name, help) \
  Key(                           \
      #section, #name, [](Config& c) -> ConfigField { return &c.section.name; }, help)

std::vector<ConfigKey> BuildSchema() {
  return {
      KEY(run, dir, "run directory, created by train").Required(),
      KEY(run, steps, "optimizer steps").In(1, kNoLimit).Required(),
      KEY(run, seed, "of initial weights, data order and dropout").In(0, kNoLimit),
      KEY(run, validate_every, "validate after each so many steps, and at the end; 0: never")
          .In(0, kNoLimit),
      KEY(run, validate_sequences, "use at most so many of the held-out sequences")
          .In(1, kNoLimit)
          .LeftOut("all of them"),
      KEY(run, log_every, "print a line after each so many steps, where no bar is drawn")
          .In(1, kNoLimit),

      KEY(model, preset, "a known shape; other keys of the section change single sizes")
          .OneOf(PresetNames())
          .LeftOut("the model is given by family or from"),
      KEY(model, family, "a model of the sizes given here")
          .OneOf({"llama", "gpt2"})
          .LeftOut("the model is given by preset or from"),
      KEY(model, from, "weights to start from: a Hugging Face directory or a checkpoint of Shoal")
          .LeftOut("weights are initialised at random"),
      KEY(model, layers, "blocks").In(1, kSize).LeftOut("the preset's, or 8"),
      KEY(model, d_model, "width of the residual stream")
          .In(1, kSize)
          .LeftOut("the preset's, or 512"),
      KEY(model, heads, "query heads").In(1, kSize).LeftOut("the preset's, or d_model / 64"),
      KEY(model, kv_heads, "key and value heads; divides heads")
          .In(1, kSize)
          .LeftOut("the preset's, or as many as heads"),
      KEY(model, head_dim, "width of one head").In(1, kSize).LeftOut("d_model / heads"),
      KEY(model, mlp, "width of the hidden layer")
          .In(1, kSize)
          .LeftOut("the preset's, or 4 d_model for gpt2, 8/3 d_model in steps of 32 for llama"),
      KEY(model, vocab, "token ids; may exceed the tokenizer's")
          .In(1, kSize)
          .LeftOut("the preset's, or the tokenizer's"),
      KEY(model, context, "longest sequence")
          .In(1, kSize)
          .LeftOut("the preset's, or data.sequence_length"),
      KEY(model, tied, "the head uses the embedding's weights")
          .LeftOut("the preset's, or true for gpt2, false for llama"),
      KEY(model, dropout, "probability in training").Below(0, 1).LeftOut("the preset's, or 0"),
      KEY(model, attention_dropout,
          "probability in training of dropping an attention weight, a multiple of 2^-16")
          .Below(0, 1)
          .LeftOut("the preset's, or 0"),
      KEY(model, rope_theta, "base of RoPE's wavelengths (llama)")
          .In(1, kNoLimit)
          .LeftOut("the preset's, or 10000"),
      KEY(model, norm_eps, "epsilon of the norms").Below(0, 1).LeftOut("the preset's, or 1e-5"),

      KEY(data, path, "text file, directory of text, .h5 of token ids, or prefix of .bin/.idx")
          .Required(),
      KEY(data, tokenizer, "of text: bytes, or a SentencePiece model")
          .OneOf({"bytes"})
          .OrFile(".model"),
      KEY(data, sequence_length, "tokens of a sequence").In(1, kSize).Required(),
      KEY(data, validation_fraction, "share of the corpus, its tail, that is held out").Below(0, 1),
      KEY(data, documents, "true: a token sees nothing of other documents in its sequence"),
      KEY(data, binary, "true: take any bytes for text"),

      KEY(batch, sequences, "per optimizer step, over all ranks").In(1, kSize).Required(),
      KEY(batch, micro, "sequences per data-parallel replica and pass")
          .In(1, kSize)
          .LeftOut("all of the replica's"),

      KEY(optim, name, "update rule").OneOf({"adamw", "sgd"}).Required(),
      KEY(optim, lr, "highest learning rate").In(0, kNoLimit).Required(),
      KEY(optim, betas, "decay of AdamW's two moments").Below(0, 1),
      KEY(optim, eps, "AdamW's epsilon").In(0, 1),
      KEY(optim, weight_decay, "decoupled weight decay, of matrices").In(0, kNoLimit),
      KEY(optim, momentum, "of SGD").Below(0, 1),
      KEY(optim, clip, "largest global norm of the gradient; 0: no limit").In(0, kNoLimit),
      KEY(optim, schedule, "of the learning rate, after the warm-up")
          .OneOf({"cosine", "linear", "wsd", "constant"}),
      KEY(optim, warmup_steps, "steps of linear warm-up").In(0, kNoLimit),
      KEY(optim, min_lr_fraction, "learning rate at the end, as a share of lr").In(0, 1),
      KEY(optim, decay_fraction, "share of the steps, the last, in which wsd decays").In(0, 1),
      KEY(optim, non_finite,
          "a step whose loss or gradient is not finite ends the run, is not applied (ten in a row "
          "end it), or sends the run back to its newest save and past the batch (three times)")
          .OneOf({"halt", "skip", "rollback"}),
      KEY(optim, in_backward,
          "update weights inside backward, as soon as their gradients are final, and free these"),
      KEY(optim, master,
          "of a bf16 weight: f32 beside it, or its upper half is the weight: 2 bytes less, and "
          "weights round to nearest with ties away from zero")
          .OneOf({"whole", "split"}),

      KEY(mesh, dp, "data-parallel replicas").In(1, kDegree).LeftOut("fills the ranks there are"),
      KEY(mesh, tp, "tensor-parallel ranks").In(1, kDegree),
      KEY(mesh, pp, "pipeline stages").In(1, kDegree),
      KEY(mesh, cp, "sequence-parallel ranks").In(1, kDegree),
      KEY(mesh, ep, "expert-parallel ranks").In(1, kDegree),
      KEY(mesh, sequence_parallel, "tensor-parallel ranks share the tokens of norms and residuals"),

      KEY(zero, stage, "ranks share 1: optimizer states, 2: and gradients, 3: and parameters")
          .In(0, 3),
      KEY(zero, shard_ranks, "ranks that share one copy of the states; the copies are replicas")
          .In(1, kDegree)
          .LeftOut("all data-parallel ranks"),
      KEY(zero, bucket, "gradients that are exchanged at once, below stage 3").Bytes(),
      KEY(zero, contiguous_gradients,
          "stages 2 and 3: gradient shares in one array, so that memory has fewer holes"),
      KEY(zero, offload,
          "where optimizer states live; a GPU's are then updated by the host. On CPU ranks host is "
          "where they are anyhow")
          .OneOf({"none", "host", "file"}),
      KEY(zero, offload_dir,
          "folder of the files for states and activations, which have no name there")
          .LeftOut("the disk of run.dir"),

      KEY(pipeline, schedule, "order of the passes, or a file that holds one")
          .OneOf({"gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"})
          .OrFile(".csv"),
      KEY(pipeline, virtual_stages, "stages of one rank").In(1, 1000).LeftOut("2 for zb_v, else 1"),
      KEY(pipeline, blocks, "how many blocks each stage has, in the order of the model")
          .In(0, kSize)
          .LeftOut("balanced by FLOPs"),

      KEY(sequence, schedule, "how attention crosses ranks")
          .OneOf({"auto", "token_ring", "token_ring_relay", "token_ring_lagged", "kv_ring",
                  "kv_ring_one_way", "kv_direct", "ulysses", "hybrid", "all_gather"}),
      KEY(sequence, layout, "which tokens a rank holds").OneOf({"contiguous", "zigzag", "striped"}),
      KEY(sequence, ulysses,
          "of hybrid: ranks that exchange heads; 0: the fastest divisor of mesh.cp")
          .In(0, kDegree),

      KEY(precision, compute, "of the passes; bf16 keeps weights and sums in fp32 as well")
          .OneOf({"fp32", "bf16", "fp64"}),

      KEY(precision, gradients,
          "auto: as compute with one pass on one rank; fp32 as soon as shares are added up")
          .OneOf({"auto", "fp32", "bf16"}),
      KEY(memory, recompute, "activations that backward computes again")
          .OneOf({"none", "full", "selective", "auto"}),
      KEY(memory, budget, "memory of one rank at its peak; more is refused at the start")
          .Bytes()
          .LeftOut("a rank's share of its host's"),
      KEY(memory, overcommit, "start even if the plan's peak is more than there is"),
      KEY(memory, partition_activations,
          "tensor-parallel ranks keep parts of what all of them would keep"),
      KEY(memory, offload_activations,
          "where what backward needs lives between the passes. On CPU ranks host is where it is "
          "anyhow")
          .OneOf({"none", "host", "file"}),
      KEY(memory, compress_activations,
          "what backward needs is kept in fewer bits: in bf16, or in 8 bits with a scale for each "
          "64 values. Gradients are those of the rounded activations")
          .OneOf({"none", "bf16", "int8"}),
      KEY(memory, mlp_chunk_rows,
          "tokens that a block's MLP computes at a time, and again in backward; 0: all, once")
          .In(0, kSize),

      KEY(method, name, "which weights are trained, and how")
          .OneOf({"full", "lora", "sltrain", "peqa", "l4q"}),

      KEY(checkpoint, every, "save after each so many steps; 0: only at the end").In(0, kNoLimit),
      KEY(checkpoint, keep,
          "newest saves that are kept; only valid ones count, and two stay even if it is 1")
          .In(1, kDegree),
      KEY(checkpoint, keep_every, "the saves of each so many steps are kept too; 0: none")
          .In(0, kNoLimit),
      KEY(checkpoint, keep_best,
          "the save with the least validation loss is kept too; saves must fall on validations"),
      KEY(checkpoint, async, "write while training goes on"),
      KEY(checkpoint, staging,
          "memory of each rank for a save on its way; a state that is larger passes through it")
          .BytesFrom(1 << 20),
      KEY(checkpoint, full_disk_wait,
          "seconds that a save waits for room on a full disk before the run ends")
          .In(0, kNoLimit),
  };
}

#undef KEY

std::string RangeText(const ConfigKey& key) {
  if (key.high >= kNoLimit) return fmt::format("{} or more", key.low);
  if (key.below) return fmt::format("from {} to below {}", key.low, key.high);
  return fmt::format("from {} to {:.0f}", key.low, key.high);
}

struct AllowedVisitor {
  const ConfigKey& key;

  std::string operator()(std::string*) const {
    if (key.choices.empty()) return "a string";
    std::string text = key.choices.size() > 1 ? "one of " : "";
    for (size_t i = 0; i < key.choices.size(); ++i)
      text += fmt::format("{}\"{}\"", i ? ", " : "", key.choices[i]);
    if (key.suffix) text += fmt::format(" or a file \"*{}\"", key.suffix);
    return text;
  }
  std::string operator()(int64_t*) const {
    if (key.bytes)
      return fmt::format("bytes, as an integer or as \"64MiB\", \"6GiB\"{}",
                         key.low > 1 ? fmt::format("; {:.0f} or more", key.low) : "");
    return "an integer, " + RangeText(key);
  }
  std::string operator()(double*) const { return "a number, " + RangeText(key); }
  std::string operator()(bool*) const { return "true or false"; }
  std::string operator()(std::array<double, 2>*) const {
    return "two numbers, each " + RangeText(key);
  }
  std::string operator()(std::vector<int64_t>*) const {
    return "a list of integers, each " + RangeText(key);
  }
  template <class T>
  std::string operator()(std::optional<T>*) const {
    return (*this)(static_cast<T*>(nullptr));
  }
};

}  // namespace

const std::vector<ConfigKey>& ConfigSchema() {
  static const std::vector<ConfigKey> schema = BuildSchema();
  return schema;
}

const std::vector<std::string>& ConfigSections() {
  static const std::vector<std::string> sections = [] {
    std::vector<std::string> list;
    for (const ConfigKey& key : ConfigSchema())
      if (list.empty() || list.back() != key.section) list.emplace_back(key.section);
    return list;
  }();
  return sections;
}

std::string Allowed(const ConfigKey& key) {
  Config any;
  return std::visit(AllowedVisitor{key}, key.field(any));
}

}  // namespace shoal
