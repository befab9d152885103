// From a configuration to a model. Parameters have no memory yet (see core/init.h): transforms come
// first.
#pragma once

#include <memory>

#include "models/language_model.h"

namespace shoal {

// By config.family.
std::shared_ptr<LanguageModel> BuildModel(const ModelConfig& config);

}  // namespace shoal
