#include "launch/hugging_face.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "launch/hugging_face_config.h"
#include "models/registry.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::string_view kModel = "model/";
constexpr const char* kTiedHead = "lm_head.weight";

struct Rename {
  std::string_view ours, theirs;
  bool transposed = false;
};
constexpr std::string_view kOurBlocks = "blocks.";

struct Names {
  std::string_view prefix;  // that files of the inner model leave away; empty: they cannot
  std::string_view blocks;
  std::vector<Rename> outside, inside;    // of a block
  std::vector<std::string_view> buffers;  // endings of what is stored but no weight
};

const Names& NamesOf(const std::string& family) {
  static const Names llama = {
      "",
      "model.layers.",
      {{"embed", "model.embed_tokens"}, {"norm", "model.norm"}, {"head", "lm_head"}},
      {{"attention_norm", "input_layernorm"},
       {"attention.q", "self_attn.q_proj"},
       {"attention.k", "self_attn.k_proj"},
       {"attention.v", "self_attn.v_proj"},
       {"attention.out", "self_attn.o_proj"},
       {"mlp_norm", "post_attention_layernorm"},
       {"mlp.gate", "mlp.gate_proj"},
       {"mlp.up", "mlp.up_proj"},
       {"mlp.down", "mlp.down_proj"}},
      {".rotary_emb.inv_freq"}};
  static const Names gpt2 = {"transformer.",
                             "transformer.h.",
                             {{"embed", "transformer.wte"},
                              {"position", "transformer.wpe"},
                              {"norm", "transformer.ln_f"},
                              {"head", "lm_head"}},
                             {{"attention_norm", "ln_1"},
                              {"attention.q", "attn.c_attn", true},
                              {"attention.k", "attn.c_attn", true},
                              {"attention.v", "attn.c_attn", true},
                              {"attention.out", "attn.c_proj", true},
                              {"mlp_norm", "ln_2"},
                              {"mlp.up", "mlp.c_fc", true},
                              {"mlp.down", "mlp.c_proj", true}},
                             {".attn.bias", ".attn.masked_bias"}};
  return family == "gpt2" ? gpt2 : llama;
}

// "blocks.3.mlp.up.weight" -> "transformer.h.3.mlp.c_fc.weight"
std::pair<std::string, bool> TheirName(const Names& names, const std::string& ours) {
  std::string_view rest = ours;
  std::string theirs;
  const bool inside = rest.starts_with(kOurBlocks);
  if (inside) {
    rest.remove_prefix(kOurBlocks.size());
    const size_t number = rest.find('.') + 1;
    theirs = std::string(names.blocks) + std::string(rest.substr(0, number));
    rest.remove_prefix(number);
  }
  const size_t field = rest.rfind('.');  // weight or bias
  for (const Rename& rename : inside ? names.inside : names.outside)
    if (rest.substr(0, field) == rename.ours)
      return {theirs + std::string(rename.theirs) + std::string(rest.substr(field)),
              rename.transposed};
  SHOAL_FAIL(ErrorKind::kBug, ours, "has no name in a Hugging Face directory");
}

[[noreturn]] void Fail(const std::string& path, const std::string& what) {
  SHOAL_FAIL(ErrorKind::kStorage, "model", "{}: {}", path, what);
}

}  // namespace

bool IsHuggingFace(const std::string& path) {
  std::error_code ignored;
  const auto has = [&](const char* file) { return fs::exists(fs::path(path) / file, ignored); };
  return has("config.json") && !has("config.toml") && !has("manifest.json");
}

Dims HuggingFaceTensor::shape() const {
  Dims whole = parts[0].shape;
  for (size_t i = 1; i < parts.size(); ++i) whole[0] += parts[i].shape[0];
  if (transposed && whole.rank() == 2) std::swap(whole[0], whole[1]);
  return whole;
}

std::vector<HuggingFaceTensor> HuggingFaceTensors(const ModelConfig& model) {
  const Names& names = NamesOf(model.family);
  std::vector<HuggingFaceTensor> tensors;
  std::map<std::string, size_t> number;
  for (const auto& p : BuildModel(model)->Parameters()) {
    const auto [name, transposed] = TheirName(names, p->name());
    const auto [at, fresh] = number.try_emplace(name, tensors.size());
    if (fresh) tensors.push_back({name, transposed && p->global_shape().rank() == 2, {}});
    tensors[at->second].parts.push_back({p->name(), p->global_shape()});
  }
  return tensors;
}

HuggingFaceModel::HuggingFaceModel(const std::string& directory)
    : directory_(directory), config_(ReadHuggingFaceConfig(directory + "/config.json")) {
  OpenFiles();
  const Names& names = NamesOf(config_.family);
  // By the full name; what a file leaves away of it is added.
  std::map<std::string, Place> stored;
  for (size_t f = 0; f < files_.size(); ++f) {
    for (const auto& [name, entry] : files_[f].entries()) {
      const auto ends = [&name = name](std::string_view ending) { return name.ends_with(ending); };
      if (std::ranges::any_of(names.buffers, ends)) continue;
      const bool whole = name.starts_with(names.prefix) || name == kTiedHead;
      const std::string full = whole ? name : std::string(names.prefix) + name;
      const auto [at, fresh] = stored.try_emplace(full, Place{f, name});
      if (!fresh)
        Fail(files_[f].path(), fmt::format("tensor {} is also in {}, as {}", name,
                                           files_[at->second.file].path(), at->second.name));
    }
  }
  const auto take = [&](const std::string& name, const Dims& shape) {
    const auto at = stored.find(name);
    if (at == stored.end())
      Fail(directory_, fmt::format("holds no tensor {}, which its config.json asks for", name));
    const Place place = at->second;
    stored.erase(at);
    const SafetensorsFile::Entry& entry = files_[place.file].entries().at(place.name);
    if (!(entry.shape == shape))
      Fail(files_[place.file].path(),
           fmt::format("tensor {} has shape {}, by config.json it has {}", place.name,
                       entry.shape.ToString(), shape.ToString()));
    if (!entry.dtype || !IsFloat(*entry.dtype))
      Fail(files_[place.file].path(),
           fmt::format("tensor {} is {}: weights are F64, F32, F16 or BF16", place.name,
                       entry.type));
    return place;
  };
  // Before so many blocks are built.
  if (config_.layers > static_cast<int64_t>(stored.size()))
    Fail(directory_, fmt::format("holds {} tensors, and config.json asks for {} layers",
                                 stored.size(), config_.layers));
  for (const HuggingFaceTensor& tensor : HuggingFaceTensors(config_)) {
    Place place = take(tensor.name, tensor.shape());
    place.transposed = tensor.transposed;
    for (const HuggingFaceTensor::Part& part : tensor.parts) {
      places_[part.name] = place;
      place.row += part.shape[0];
    }
  }
  if (config_.tied && stored.contains(kTiedHead))
    tied_head_ = take(kTiedHead, {config_.vocab, config_.d_model});
  if (!stored.empty()) {
    const Place& first = stored.begin()->second;
    Fail(files_[first.file].path(),
         fmt::format("tensor {}{} is not part of the model that config.json describes", first.name,
                     stored.size() == 1 ? "" : fmt::format(" (and {} more)", stored.size() - 1)));
  }
}

void HuggingFaceModel::OpenFiles() {
  const std::string single = directory_ + "/model.safetensors", index = single + ".index.json";
  std::error_code ignored;
  // As the published loader chooses where there are both.
  if (fs::exists(single, ignored)) {
    files_.emplace_back(single);
    return;
  }
  if (!fs::exists(index, ignored))
    Fail(directory_, "holds neither model.safetensors nor model.safetensors.index.json");
  const json object = ReadJsonObject(index);
  if (!object.contains("weight_map") || !object["weight_map"].is_object())
    Fail(index, "has no weight_map");
  std::map<std::string, std::set<std::string>> shards;  // their tensors
  for (const auto& [name, file] : object["weight_map"].items()) {
    if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos)
      Fail(index, fmt::format("tensor {} is in no file of this directory, but in {}", name,
                              file.dump(-1, ' ', true, json::error_handler_t::replace)));
    shards[file.get<std::string>()].insert(name);
  }
  for (const auto& [file, names] : shards) {
    const SafetensorsFile& opened = files_.emplace_back(directory_ + "/" + file);
    for (const std::string& name : names)
      if (!opened.entries().contains(name))
        Fail(opened.path(), fmt::format("holds no tensor {}, which {} says is in it", name, index));
    for (const auto& [name, entry] : opened.entries())
      if (!names.contains(name))
        Fail(opened.path(), fmt::format("tensor {} is not in {}", name, index));
  }
}

DType HuggingFaceModel::dtype() const {
  const Place& place = places_.at("embed.weight");
  return *files_[place.file].entries().at(place.name).dtype;
}

std::string HuggingFaceModel::tokenizer() const {
  std::error_code ignored;
  const std::string path = directory_ + "/tokenizer.model";
  return fs::exists(path, ignored) ? fs::absolute(path).string() : "bytes";
}

int64_t HuggingFaceModel::Load(const StateDict& weights) const {
  int64_t bytes = 0;
  for (const StateEntry& entry : weights) {
    SHOAL_CHECK(entry.name.starts_with(kModel), "model", "{} is no weight", entry.name);
    const std::string name = entry.name.substr(kModel.size());
    const auto found = places_.find(name);
    if (found == places_.end()) Fail(directory_, fmt::format("holds no tensor for {}", name));
    if (tied_head_ && name == "embed.weight") {
      const Tensor head =
          Tensor::Empty(entry.tensor.shape(), entry.tensor.dtype(), MemoryClass::kWorkspace);
      StateEntry copy = entry;
      copy.tensor = head;
      bytes += ReadEntry(copy, *tied_head_) + ReadEntry(entry, found->second);
      if (std::memcmp(head.view().data, entry.tensor.view().data, head.bytes()) != 0)
        Fail(files_[tied_head_->file].path(),
             fmt::format("tensor {} is not {}, though tie_word_embeddings says so", kTiedHead,
                         found->second.name));
    } else {
      bytes += ReadEntry(entry, found->second);
    }
  }
  return bytes;
}

int64_t HuggingFaceModel::ReadEntry(const StateEntry& entry, const Place& place) const {
  const int64_t count = entry.tensor.numel();
  if (count == 0) return 0;
  // The smallest box of our slice that holds all that is wanted.
  Dims offset = entry.offset, box = entry.share ? entry.share->slice : entry.tensor.shape();
  int64_t first = entry.share ? entry.share->begin : 0;
  const int64_t width = box.rank() == 2 ? box[1] : 1;
  offset[0] += first / width;
  box[0] = (first + count - 1) / width + 1 - first / width;
  first %= width;
  offset[0] += place.row;
  if (place.transposed) {
    std::swap(offset[0], offset[1]);
    std::swap(box[0], box[1]);
  }
  const SafetensorsFile& file = files_[place.file];
  Tensor stored = Tensor::Empty(box, *file.entries().at(place.name).dtype, MemoryClass::kWorkspace);
  const int64_t bytes = file.Read(place.name, offset, box, stored.view().data);
  if (place.transposed) stored = stored.Transposed(0, 1);
  if (entry.share) {
    if (place.transposed) stored = stored.Clone(MemoryClass::kWorkspace);
    stored = stored.Reshaped({-1}).Narrowed(0, first, count);
  }
  entry.tensor.CopyFrom(stored);
  return bytes;
}

}  // namespace shoal
