#include "models/presets.h"

namespace shoal {
namespace {

struct Preset {
  const char* name;
  ModelConfig config;
};

ModelConfig Llama(int64_t d_model, int64_t layers, int64_t heads, int64_t mlp) {
  return {.family = "llama",
          .layers = layers,
          .d_model = d_model,
          .heads = heads,
          .kv_heads = heads,
          .head_dim = d_model / heads,
          .mlp = mlp,
          .vocab = 32000,
          .context = 2048,
          .norm_eps = 1e-6};
}

ModelConfig Llama8b() {
  ModelConfig c = Llama(4096, 32, 32, 14336);
  c.kv_heads = 8;
  c.vocab = 128256;
  c.context = 8192;
  c.rope_theta = 500000.0;
  c.norm_eps = 1e-5;
  return c;
}

ModelConfig Gpt2(int64_t d_model, int64_t layers, int64_t heads) {
  return {.family = "gpt2",
          .layers = layers,
          .d_model = d_model,
          .heads = heads,
          .kv_heads = heads,
          .head_dim = d_model / heads,
          .mlp = 4 * d_model,
          .vocab = 50257,
          .context = 1024,
          .tied = true};
}

const std::vector<Preset>& Presets() {
  static const std::vector<Preset> presets = {
      {"llama-60m", Llama(512, 8, 8, 1376)},     {"llama-130m", Llama(768, 12, 12, 2048)},
      {"llama-350m", Llama(1024, 24, 16, 2736)}, {"llama-1b", Llama(2048, 24, 32, 5461)},
      {"llama-7b", Llama(4096, 32, 32, 11008)},  {"llama-8b", Llama8b()},
      {"gpt2-124m", Gpt2(768, 12, 12)},          {"gpt2-350m", Gpt2(1024, 24, 16)},
      {"gpt2-774m", Gpt2(1280, 36, 20)},         {"gpt2-1.5b", Gpt2(1600, 48, 25)},
  };
  return presets;
}

}  // namespace

const std::vector<std::string>& PresetNames() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Preset& preset : Presets()) list.push_back(preset.name);
    return list;
  }();
  return names;
}

const ModelConfig* FindPreset(std::string_view name) {
  for (const Preset& preset : Presets())
    if (name == preset.name) return &preset.config;
  return nullptr;
}

}  // namespace shoal
