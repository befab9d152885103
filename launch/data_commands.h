// `shoal data build` and `shoal data inspect`: data/build.h, told to a person or as JSON.
#pragma once

#include <string>

#include "data/build.h"

namespace shoal {

int DataBuildCommand(const BuildOptions& options, bool json);
int DataInspectCommand(const std::string& path, const std::string& tokenizer, bool json);

}  // namespace shoal
