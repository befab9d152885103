// What the tests of the configuration share: the smallest valid one, and the messages that mistakes
// in it give.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/base/error.h"
#include "launch/config.h"

namespace shoal {

inline constexpr const char* kMinimal = R"([run]
dir = "r"
steps = 10
[model]
preset = "llama-60m"
[data]
path = "/corpus"
sequence_length = 256
[batch]
sequences = 8
[optim]
name = "adamw"
lr = 1e-3
)";

inline Config Minimal(const std::vector<std::string>& overrides = {}) {
  return ParseConfig(kMinimal, "c.toml", overrides);
}

// The message of the Error(kConfig) that `f` throws; empty if it throws none.
template <class F>
std::string Mistake(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kConfig) << e.what();
    return e.message();
  }
  return "";
}

inline std::string MistakeIn(const std::string& text,
                             const std::vector<std::string>& overrides = {}) {
  return Mistake([&] { ParseConfig(text, "c.toml", overrides); });
}

inline std::string MistakeOf(const std::string& override_text) {
  return Mistake([&] { Minimal({override_text}); });
}

}  // namespace shoal
