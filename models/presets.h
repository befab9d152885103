// Known shapes by name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "models/config.h"

namespace shoal {

// "llama-60m" ... "llama-7b": Han et al., "SLTrain", 2024, table of model sizes (as in GaLore);
// "llama-8b": Llama 3 8B; "gpt2-124m" ... "gpt2-1.5b": Radford et al., 2019.
const std::vector<std::string>& PresetNames();
const ModelConfig* FindPreset(std::string_view name);  // null if there is none

}  // namespace shoal
