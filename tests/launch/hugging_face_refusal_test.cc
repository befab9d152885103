// What Hugging Face directories say that Shoal cannot be, and what is missing or damaged in them.
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "tests/launch/hugging_face.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

using HuggingFaceRefusal = HuggingFace;

TEST_F(HuggingFaceRefusal, WhatIsNotOursIsRefusedByKeyAndValue) {
  const std::string out = Path("out");
  const struct {
    const char *family, *key, *value, *words;
  } cases[] = {
      {"llama", "architectures", R"(["MistralForCausalLM"])", "MistralForCausalLM"},
      {"llama", "architectures", "null", "has no architectures"},
      {"llama", "model_type", R"("mistral")", "model_type is \"mistral\""},
      {"llama", "hidden_act", R"("gelu")", "hidden_act is \"gelu\": Shoal has \"silu\""},
      {"llama", "attention_bias", "true", "attention_bias is true"},
      {"llama", "mlp_bias", "true", "mlp_bias is true"},
      {"llama", "sliding_window", "4096", "sliding_window is 4096"},
      {"llama", "quantization_config", R"({"bits": 4})", "quantization_config is {\"bits\":4}"},
      {"llama", "rope_scaling", R"({"rope_type": "llama3", "factor": 8.0})",
       "rope_scaling.rope_type is \"llama3\""},
      {"llama", "rope_scaling", R"({"type": "linear"})", "rope_scaling.type is \"linear\""},
      {"llama", "rope_scaling", R"({"factor": 8.0})", "rope_scaling.factor is 8.0"},
      {"llama", "rope_parameters", R"({"rope_theta": 5})", "rope_parameters.rope_theta is 5"},
      {"llama", "rope_theta", "0", "rope_theta is 0"},
      {"llama", "hidden_size", "-1", "hidden_size is -1"},
      {"llama", "hidden_size", "24.0", "hidden_size is 24.0"},
      {"llama", "hidden_size", "1000000000000", "hidden_size is 1000000000000"},
      {"llama", "num_hidden_layers", "999999999", "999999999 layers"},
      {"llama", "num_key_value_heads", "4", "kv_heads 4 does not divide heads 6"},
      {"llama", "vocab_size", "null", "has no vocab_size"},
      {"llama", "rms_norm_eps", R"("1e-5")", "rms_norm_eps is \"1e-5\""},
      {"llama", "tie_word_embeddings", "1", "tie_word_embeddings is 1"},
      {"gpt2", "activation_function", R"("gelu")", "activation_function is \"gelu\""},
      {"gpt2", "scale_attn_by_inverse_layer_idx", "true",
       "scale_attn_by_inverse_layer_idx is true"},
      {"gpt2", "scale_attn_weights", "false", "scale_attn_weights is false"},
      {"gpt2", "n_head", "7", "n_head is 7"},
      {"gpt2", "n_ctx", "17", "n_ctx is 17"},
      {"gpt2", "add_cross_attention", "true", "add_cross_attention is true"},
  };
  for (const std::string family : {"llama", "gpt2"})
    ExportHuggingFace(Save(Small(family, true), DType::kF32, family + "_saves"), Path(family), {});
  for (const auto& [family, key, value, words] : cases) {
    json config = json::parse(ReadText(Path(family) + "/config.json"));
    const std::string good = config.dump();
    config[key] = json::parse(value);
    std::ofstream(Path(family) + "/config.json") << config.dump();
    std::string message;
    try {
      HuggingFaceModel model(Path(family));
    } catch (const Error& e) {
      EXPECT_TRUE(e.kind() == ErrorKind::kConfig || e.kind() == ErrorKind::kStorage);
      message = e.message();
    }
    EXPECT_NE(message.find(words), std::string::npos) << key << ": " << message;
    EXPECT_NE(message.find(Path(family)), std::string::npos) << message;
    std::ofstream(Path(family) + "/config.json") << good;
  }
  const HuggingFaceModel whole(Path("llama"));
  for (const std::string text : {"", "[]", "{", "{\"a\": NaN}", "\xff"}) {
    std::ofstream(Path("llama/config.json")) << text;
    EXPECT_NE(ErrorOf([&] { HuggingFaceModel model(Path("llama")); }, ErrorKind::kStorage)
                  .find("config.json: is no JSON object"),
              std::string::npos);
  }
  std::ofstream(Path("llama/config.json")) << std::string(1 << 22, '[');
  EXPECT_NE(ErrorOf([&] { HuggingFaceModel model(Path("llama")); }, ErrorKind::kStorage)
                .find("config.json: is no JSON object"),
            std::string::npos);
}

// Rewrites a single-file directory with its tensors changed.
void Rewrite(const std::string& directory,
             const std::function<void(std::vector<SafetensorsWriter::Entry>*)>& change,
             const std::string& name = "model.safetensors") {
  std::vector<SafetensorsWriter::Entry> entries;
  std::map<std::string, std::string> data;
  {
    const SafetensorsFile file(directory + "/model.safetensors");
    for (const auto& [tensor, entry] : file.entries()) {
      entries.push_back({tensor, *entry.dtype, entry.shape});
      data[tensor].resize(static_cast<size_t>(entry.end - entry.begin));
      Dims zero = entry.shape;
      for (int d = 0; d < zero.rank(); ++d) zero[d] = 0;
      file.Read(tensor, zero, entry.shape, data[tensor].data());
    }
  }
  change(&entries);
  SafetensorsWriter writer(directory + "/" + name, entries);
  for (const auto& entry : entries) {
    std::string& bytes = data[entry.name];
    if (bytes.empty() && entry.name == "lm_head.weight") bytes = data["model.embed_tokens.weight"];
    bytes.resize(static_cast<size_t>(entry.bytes()));
    writer.Write(entry.name, bytes.data());
  }
  writer.Commit();
}

TEST_F(HuggingFaceRefusal, MissingExtraAndMisshapedTensorsAreNamed) {
  const std::string save = Save(Small("llama", true), DType::kF32);
  const auto refusal = [&](const auto& change) {
    fs::remove_all(Path("out"));
    ExportHuggingFace(save, Path("out"), {});
    Rewrite(Path("out"), change);
    return ErrorOf([&] { HuggingFaceModel model(Path("out")); }, ErrorKind::kStorage);
  };
  using Entries = std::vector<SafetensorsWriter::Entry>;
  EXPECT_NE(refusal([](Entries* e) { e->erase(e->begin()); }).find("holds no tensor model.embed"),
            std::string::npos);
  EXPECT_NE(refusal([](Entries* e) {
              e->push_back({"model.extra", DType::kF32, {1}});
            }).find("tensor model.extra is not part of the model"),
            std::string::npos);
  EXPECT_NE(refusal([](Entries* e) {
              (*e)[0].shape = {64, 24};
            }).find("has shape [64, 24], by config.json it has [65, 24]"),
            std::string::npos);
  EXPECT_NE(refusal([](Entries* e) { (*e)[0].dtype = DType::kI32; }).find("is I32"),
            std::string::npos);
  // What is stored beside the weights, and says nothing.
  EXPECT_EQ(refusal([](Entries* e) {
              e->push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", DType::kF32, {2}});
            }),
            "no error");
  // A tied head that is stored must be the embedding.
  EXPECT_EQ(refusal([](Entries* e) {
              e->push_back({"lm_head.weight", DType::kF32, {65, 24}});
            }),
            "no error");
  const auto built = BuildModel(Small("llama", true));
  MaterializeParameters(*built, DType::kF32, 1);
  HuggingFaceModel(Path("out")).Load(ModelState(*built));
  std::fstream file(Path("out/model.safetensors"), std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-1, std::ios::end);
  file.put('\x7e');
  file.close();
  EXPECT_NE(
      ErrorOf([&] { HuggingFaceModel(Path("out")).Load(ModelState(*built)); }, ErrorKind::kStorage)
          .find("tensor lm_head.weight is not model.embed_tokens.weight"),
      std::string::npos);
}

TEST_F(HuggingFaceRefusal, ShardsAreHeldAgainstTheirIndex) {
  const std::string save = Save(Small("llama", false), DType::kF32);
  ExportHuggingFace(save, Path("out"), {.shard_bytes = 20000});
  const std::string index = Path("out/model.safetensors.index.json");
  const json good = json::parse(ReadText(index));
  int64_t total = 0;
  for (const auto& [name, file] : good["weight_map"].items()) {
    const SafetensorsFile shard(Path("out/" + file.get<std::string>()));
    total += shard.entries().at(name).end - shard.entries().at(name).begin;
  }
  EXPECT_EQ(good["metadata"]["total_size"], total);
  const auto refusal = [&](const json& changed) {
    std::ofstream(index) << changed.dump();
    return ErrorOf([&] { HuggingFaceModel model(Path("out")); }, ErrorKind::kStorage);
  };
  EXPECT_EQ(refusal(good), "no error");
  json changed = good;
  changed["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors";
  EXPECT_NE(refusal(changed).find("model.norm.weight"), std::string::npos);
  changed = good;
  changed["weight_map"]["model.norm.weight"] = "../model.safetensors";
  EXPECT_NE(refusal(changed).find("is in no file of this directory"), std::string::npos);
  changed = good;
  changed["weight_map"]["model.norm.weight"] = 3;
  EXPECT_NE(refusal(changed).find("is in no file of this directory"), std::string::npos);
  changed = good;
  changed["weight_map"].erase("model.norm.weight");
  EXPECT_NE(refusal(changed).find("tensor model.norm.weight is not in"), std::string::npos);
  changed = good;
  for (auto& file : changed["weight_map"])
    if (file == "model-00003-of-00003.safetensors") file = "model-00009-of-00003.safetensors";
  EXPECT_NE(refusal(changed).find("model-00009-of-00003.safetensors: cannot be read"),
            std::string::npos);
  EXPECT_NE(refusal(json::object()).find("has no weight_map"), std::string::npos);
  fs::remove(index);
  EXPECT_NE(ErrorOf([&] { HuggingFaceModel model(Path("out")); }, ErrorKind::kStorage)
                .find("holds neither"),
            std::string::npos);
}

TEST_F(HuggingFaceRefusal, WhatHuggingFaceCannotSayIsNotExported) {
  ModelConfig model = Small("gpt2", true);
  model.head_dim = 5;
  EXPECT_NE(ErrorOf([&] { ExportHuggingFace(Save(model, DType::kF32), Path("out"), {}); },
                    ErrorKind::kConfig)
                .find("n_embd / n_head"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(Path("out")));
}

TEST_F(HuggingFaceRefusal, NothingIsOverwrittenAndNothingIsLeft) {
  const std::string save = Save(Small("llama", false), DType::kF32);
  std::ofstream(Path("taken")) << "mine";
  for (const std::string& out : {Path("taken"), Path("no/such/parent"), save})
    ErrorOf([&] { ExportHuggingFace(save, out, {}); }, ErrorKind::kStorage);
  EXPECT_EQ(ReadText(Path("taken")), "mine");
  // One that breaks off: a tensor of the save is damaged.
  std::fstream file(save + "/rank-0000.h5", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-9, std::ios::end);
  file.put('\x7e');
  file.close();
  const std::string message =
      ErrorOf([&] { ExportHuggingFace(save, Path("out"), {}); }, ErrorKind::kStorage);
  EXPECT_NE(message.find("is not as it was written"), std::string::npos) << message;
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_.path()), fs::directory_iterator()), 2);
}

}  // namespace
}  // namespace shoal
