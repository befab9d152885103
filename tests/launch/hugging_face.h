// Saves of small models, and what they become as Hugging Face directories.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>

#include "checkpoint/store.h"
#include "core/init.h"
#include "launch/hugging_face.h"
#include "launch/interchange.h"
#include "launch/session.h"
#include "tests/launch/config_mistakes.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {

inline ModelConfig Small(const std::string& family, bool tied) {
  ModelConfig c;
  c.family = family;
  c.layers = 2;
  c.d_model = 24;
  c.heads = 6;
  c.kv_heads = family == "llama" ? 2 : 6;
  c.head_dim = 4;
  c.mlp = 37;
  c.vocab = 65;
  c.context = 16;
  c.tied = tied;
  if (family == "llama") c.rope_theta = 12345.5;
  if (family == "gpt2") c.dropout = 0.25;
  c.attention_dropout = 0.125;
  return c;
}

class HuggingFace : public ::testing::Test {
 protected:
  std::string Path(const std::string& name) const { return directory_.path() + "/" + name; }

  // A save with the weights of a fresh model, and masters that are not quite these.
  std::string Save(const ModelConfig& model, DType dtype, const std::string& name = "saves",
                   bool split_masters = false) {
    const auto built = BuildModel(model);
    MaterializeParameters(*built, dtype, 5);
    StateDict state = ModelState(*built);
    // Biases and gains begin as zeros and ones, which cannot be confused with each other's.
    for (const StateEntry& entry : state) {
      if (entry.global_shape.rank() > 1) continue;
      for (int64_t i = 0; i < entry.tensor.numel(); ++i)
        entry.tensor.Narrowed(0, i, 1).Fill(0.25 * static_cast<double>(HashOf(entry.name) % 64) +
                                            static_cast<double>(i) / 64);
    }
    if (dtype == DType::kBF16) {
      const size_t weights = state.size();
      for (size_t i = 0; i < weights; ++i) {
        StateEntry master = state[i];
        master.name.replace(0, std::strlen("model"),
                            split_masters ? "optim/split_master" : "optim/master");
        if (split_masters) {  // 8 of the steps of 2^-23 that a float takes there
          state[i].tensor.Reshaped({-1}).Narrowed(0, 0, 1).Fill(1);
          master.tensor = Tensor::Full(state[i].tensor.shape(), DType::kI16, 0);
        } else {
          master.tensor = state[i].tensor.To(DType::kF32);
        }
        master.tensor.Reshaped({-1}).Narrowed(0, 0, 1).Fill(split_masters ? 8 : 1 + 0x1p-20);
        state.push_back(master);
      }
    }
    Config config = Minimal();
    const Config shape = WeightsConfig(model, "bytes", dtype);
    config.model = shape.model;
    config.precision = shape.precision;
    config.data.sequence_length = 1;
    std::filesystem::create_directories(Path(name));
    return SaveState(Path(name), {3, 0, WriteConfig(config), "f"}, state);
  }

  static size_t HashOf(const std::string& name) {
    size_t hash = 7;
    for (const char c : name) hash = hash * 31 + static_cast<unsigned char>(c);
    return hash;
  }

  static std::map<std::string, std::string> Files(const std::string& directory) {
    std::map<std::string, std::string> files;
    for (const auto& file : std::filesystem::directory_iterator(directory))
      files[file.path().filename()] = ReadText(file.path());
    return files;
  }

  template <class F>
  static std::string ErrorOf(F&& f, ErrorKind kind) {
    try {
      f();
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), kind) << e.message();
      return e.message();
    }
    return "no error";
  }

  TemporaryDirectory directory_;
};

}  // namespace shoal
