// A model as a Hugging Face directory holds it: config.json, and model.safetensors or shards of it
// with model.safetensors.index.json.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "core/state_dict.h"
#include "models/config.h"

namespace shoal {

// True if `path` is such a directory, by its config.json, and no run or save of ours.
bool IsHuggingFace(const std::string& path);

// One of their tensors and what it is of ours: our parameters, one behind the other in the first
// dimension, and then transposed (GPT-2's Conv1D). Rotary embeddings are half-split on both sides,
// so no row changes its place.
struct HuggingFaceTensor {
  struct Part {
    std::string name;  // of our parameter
    Dims shape;
  };
  std::string name;
  bool transposed = false;
  std::vector<Part> parts;
  Dims shape() const;  // as it is stored
};
// All tensors of a model by the names of the published code. A tied head is none.
std::vector<HuggingFaceTensor> HuggingFaceTensors(const ModelConfig& model);

class HuggingFaceModel {
 public:
  // Reads config.json and the headers of all files. Error(kConfig) for a model that Shoal does not
  // have, Error(kStorage) for a missing or unknown tensor, or one of another shape.
  explicit HuggingFaceModel(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  DType dtype() const;            // that the embedding is stored in
  std::string tokenizer() const;  // its tokenizer.model, or "bytes"

  // Reads what `weights` wants ("model/..."), and nothing else, converting dtypes. Returns the
  // bytes read. Error(kStorage) where a head that is tied is stored, and is not the embedding.
  int64_t Load(const StateDict& weights) const;

 private:
  // Where one of our parameters is.
  struct Place {
    size_t file = 0;
    std::string name;  // theirs
    int64_t row = 0;   // that our first row is
    bool transposed = false;
  };
  void OpenFiles();
  int64_t ReadEntry(const StateEntry& entry, const Place& place) const;

  std::string directory_;
  ModelConfig config_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Place> places_;  // by our name
  std::optional<Place> tied_head_;       // a copy of the embedding
};

}  // namespace shoal
