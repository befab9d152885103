// The table of all keys: parsing, checking, suggesting, help and writing follow from it.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "launch/config.h"

namespace shoal {

// Where a key's value lives. An optional one may stay without a value.
using ConfigField =
    std::variant<std::string*, int64_t*, double*, bool*, std::array<double, 2>*,
                 std::optional<std::string>*, std::optional<int64_t>*, std::optional<double>*,
                 std::optional<bool>*, std::optional<std::vector<int64_t>>*>;

struct ConfigKey {
  const char* section = "";
  const char* name = "";
  ConfigField (*field)(Config&) = nullptr;
  const char* help = "";
  double low = 0, high = 0;          // of a number, both allowed
  bool below = false;                // high itself is not allowed
  std::vector<std::string> choices;  // of a string; empty: any that is not empty
  const char* suffix = nullptr;      // of a string: any with this ending is allowed too
  bool required = false;
  bool bytes = false;              // an integer that may be written "6GiB"
  const char* left_out = nullptr;  // of an optional one: what its absence means

  std::string path() const { return std::string(section) + "." + name; }
};

const std::vector<ConfigKey>& ConfigSchema();
const std::vector<std::string>& ConfigSections();

// "an integer from 0 to 3", "one of ...".
std::string Allowed(const ConfigKey& key);

}  // namespace shoal
