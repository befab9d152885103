// config.json of a Hugging Face directory. LlamaForCausalLM and GPT2LMHeadModel are read and
// written; what else a configuration may ask for, and our models do not compute, is refused.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "core/base/dtype.h"
#include "models/config.h"

namespace shoal {

// Error(kConfig) naming the file, the key and its value where the model is none of ours;
// Error(kStorage) where the file is no configuration. Keys that are left out, or null, have the
// values of the published loader. Dropout is resid_pdrop, that of attention weights attn_pdrop or
// attention_dropout: how to train, not what the weights are.
ModelConfig ReadHuggingFaceConfig(const std::string& path);

// Error(kConfig) if the published architecture cannot say what `model` is.
std::string HuggingFaceConfigJson(const ModelConfig& model, DType dtype,
                                  std::optional<int64_t> end_of_document);

// A JSON object of at most 64 MB; Error(kStorage) naming the file.
nlohmann::json ReadJsonObject(const std::string& path);

}  // namespace shoal
