#include "tests/launch/hugging_face.h"

#include <algorithm>
#include <random>

#include "models/presets.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

const std::vector<ModelConfig>& Models() {
  static const std::vector<ModelConfig> models = {Small("llama", false), Small("llama", true),
                                                  Small("gpt2", true), Small("gpt2", false)};
  return models;
}

std::vector<double> Stored(const SafetensorsFile& file, const std::string& name) {
  const auto& entry = file.entries().at(name);
  const Tensor tensor = Tensor::Empty(entry.shape, *entry.dtype);
  Dims zero = entry.shape;
  for (int d = 0; d < zero.rank(); ++d) zero[d] = 0;
  file.Read(name, zero, entry.shape, tensor.view().data);
  return tensor.ToVector();
}

TEST_F(HuggingFace, ExportImportExportIsBitwise) {
  int n = 0;
  for (const ModelConfig& model : Models()) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF64}) {
      for (const int64_t shard : {int64_t{1} << 40, int64_t{9000}}) {
        if (shard == 9000 && dtype != DType::kF32) continue;
        const std::string number = std::to_string(n++);
        const std::string save = Save(model, dtype, "saves" + number);
        const Interchange out =
            ExportHuggingFace(save, Path("out" + number), {.shard_bytes = shard});
        EXPECT_EQ(out.dtype, dtype);
        EXPECT_EQ(out.files.size() > 1, shard == 9000);
        EXPECT_EQ(out.bytes, ParameterCount(model) * static_cast<int64_t>(SizeOf(dtype)));
        const std::string in = ImportHuggingFace(out.path, Path("in" + number)).path;
        VerifySave(in);
        EXPECT_EQ(ModelShape(LoadModel(in).config), [&] {
          ModelConfig expected = model;
          expected.dropout = model.family == "gpt2" ? model.dropout : 0;
          return expected;
        }());
        ExportHuggingFace(in, Path("again" + number), {.shard_bytes = shard});
        EXPECT_TRUE(Files(out.path) == Files(Path("again" + number)));
        // And the weights are where they were.
        const LoadedModel first = LoadModel(save), second = LoadModel(in);
        const auto a = first.model->Parameters(), b = second.model->Parameters();
        ASSERT_EQ(a.size(), b.size());
        for (size_t i = 0; i < a.size(); ++i) {
          EXPECT_EQ(a[i]->name(), b[i]->name());
          EXPECT_TRUE(a[i]->value().dtype() == b[i]->value().dtype() &&
                      a[i]->value().ToVector() == b[i]->value().ToVector())
              << a[i]->name();
        }
      }
    }
  }
}

// The published layout, written down beside the code: GPT-2's projections are [in, out], and q, k
// and v one matrix.
TEST_F(HuggingFace, Gpt2IsStoredAsPublished) {
  const ModelConfig model = Small("gpt2", true);
  const std::string save = Save(model, DType::kF32);
  ExportHuggingFace(save, Path("out"), {});
  const SafetensorsFile file(Path("out/model.safetensors"));
  EXPECT_EQ(file.entries().size(), 4u + 12u * 2u);
  const LoadedModel loaded = LoadModel(save);
  std::map<std::string, std::vector<double>> ours;
  for (const auto& p : loaded.model->Parameters()) ours[p->name()] = p->value().ToVector();
  const size_t d = 24, f = 37;
  for (const std::string layer : {"0", "1"}) {
    const std::string theirs = "transformer.h." + layer + ".", block = "blocks." + layer + ".";
    const std::vector<double> fused = Stored(file, theirs + "attn.c_attn.weight");
    const std::vector<double> bias = Stored(file, theirs + "attn.c_attn.bias");
    ASSERT_EQ(fused.size(), d * 3 * d);
    ASSERT_EQ(bias.size(), 3 * d);
    bool same = true;
    for (size_t part = 0; part < 3; ++part) {
      const std::string name = block + "attention." + std::string("qkv").substr(part, 1);
      for (size_t o = 0; o < d; ++o) {
        same = same && bias[part * d + o] == ours[name + ".bias"][o];
        for (size_t i = 0; i < d; ++i)
          same = same && fused[i * 3 * d + part * d + o] == ours[name + ".weight"][o * d + i];
      }
    }
    EXPECT_TRUE(same) << "attn.c_attn";
    const auto transposed = [&](const std::string& name, const std::string& from, size_t in,
                                size_t out) {
      const std::vector<double> stored = Stored(file, theirs + name + ".weight");
      bool equal = stored.size() == in * out;
      for (size_t i = 0; equal && i < in; ++i)
        for (size_t o = 0; o < out; ++o)
          equal = equal && stored[i * out + o] == ours[block + from + ".weight"][o * in + i];
      EXPECT_TRUE(equal) << name;
      EXPECT_TRUE(Stored(file, theirs + name + ".bias") == ours[block + from + ".bias"]) << name;
    };
    transposed("attn.c_proj", "attention.out", d, d);
    transposed("mlp.c_fc", "mlp.up", d, f);
    transposed("mlp.c_proj", "mlp.down", f, d);
    for (const std::string field : {"weight", "bias"}) {
      EXPECT_TRUE(Stored(file, theirs + "ln_1." + field) ==
                  ours[block + "attention_norm." + field]);
      EXPECT_TRUE(Stored(file, theirs + "ln_2." + field) == ours[block + "mlp_norm." + field]);
      EXPECT_TRUE(Stored(file, "transformer.ln_f." + field) == ours["norm." + field]);
    }
  }
  EXPECT_TRUE(Stored(file, "transformer.wte.weight") == ours["embed.weight"]);
  EXPECT_TRUE(Stored(file, "transformer.wpe.weight") == ours["position.weight"]);
}

TEST_F(HuggingFace, LlamaIsStoredAsPublished) {
  const std::string save = Save(Small("llama", false), DType::kF32);
  ExportHuggingFace(save, Path("out"), {});
  const SafetensorsFile file(Path("out/model.safetensors"));
  std::map<std::string, std::string> names = {{"model.embed_tokens.weight", "embed.weight"},
                                              {"model.norm.weight", "norm.weight"},
                                              {"lm_head.weight", "head.weight"}};
  for (const std::string layer : {"0", "1"}) {
    const std::string theirs = "model.layers." + layer + ".", block = "blocks." + layer + ".";
    for (const auto& [name, ours] : {std::pair("self_attn.q_proj", "attention.q"),
                                     {"self_attn.k_proj", "attention.k"},
                                     {"self_attn.v_proj", "attention.v"},
                                     {"self_attn.o_proj", "attention.out"},
                                     {"mlp.gate_proj", "mlp.gate"},
                                     {"mlp.up_proj", "mlp.up"},
                                     {"mlp.down_proj", "mlp.down"},
                                     {"input_layernorm", "attention_norm"},
                                     {"post_attention_layernorm", "mlp_norm"}})
      names[theirs + name + ".weight"] = block + ours + ".weight";
  }
  EXPECT_EQ(file.entries().size(), names.size());
  const LoadedModel loaded = LoadModel(save);
  for (const auto& p : loaded.model->Parameters()) {
    const auto found =
        std::ranges::find(names, p->name(), &std::pair<const std::string, std::string>::second);
    ASSERT_NE(found, names.end()) << p->name();
    EXPECT_EQ(file.entries().at(found->first).shape, p->shape()) << p->name();
    EXPECT_TRUE(Stored(file, found->first) == p->value().ToVector()) << p->name();
  }
  ExportHuggingFace(Save(Small("llama", true), DType::kF32, "tied"), Path("tied_out"), {});
  EXPECT_FALSE(
      SafetensorsFile(Path("tied_out/model.safetensors")).entries().contains("lm_head.weight"));
}

std::map<std::string, Dims> PublishedGpt2(int64_t layers, int64_t d, int64_t vocab,
                                          int64_t context) {
  std::map<std::string, Dims> published = {{"wte.weight", {vocab, d}},
                                           {"wpe.weight", {context, d}},
                                           {"ln_f.weight", {d}},
                                           {"ln_f.bias", {d}}};
  for (int64_t n = 0; n < layers; ++n) {
    const std::string h = fmt::format("h.{}.", n);
    for (const char* norm : {"ln_1", "ln_2"})
      for (const char* field : {".weight", ".bias"}) published[h + norm + field] = {d};
    published[h + "attn.c_attn.weight"] = {d, 3 * d};
    published[h + "attn.c_attn.bias"] = {3 * d};
    published[h + "attn.c_proj.weight"] = {d, d};
    published[h + "attn.c_proj.bias"] = {d};
    published[h + "mlp.c_fc.weight"] = {d, 4 * d};
    published[h + "mlp.c_fc.bias"] = {4 * d};
    published[h + "mlp.c_proj.weight"] = {4 * d, d};
    published[h + "mlp.c_proj.bias"] = {d};
  }
  return published;
}

TEST_F(HuggingFace, Gpt2PresetHasThePublishedTensors) {
  const auto published = PublishedGpt2(12, 768, 50257, 1024);
  ASSERT_EQ(published.size(), 148u);
  std::map<std::string, Dims> ours;
  for (const HuggingFaceTensor& t : HuggingFaceTensors(*FindPreset("gpt2-124m"))) {
    ASSERT_TRUE(t.name.starts_with("transformer.")) << t.name;
    ours[t.name.substr(12)] = t.shape();
  }
  EXPECT_TRUE(ours == published);
}

using LongHuggingFace = HuggingFace;
TEST_F(LongHuggingFace, Gpt2PresetExportsThePublishedTensors) {
  ExportHuggingFace(Save(*FindPreset("gpt2-124m"), DType::kF32), Path("out"), {});
  const SafetensorsFile file(Path("out/model.safetensors"));
  std::map<std::string, Dims> ours;
  for (const auto& [name, entry] : file.entries()) {
    EXPECT_EQ(entry.type, "F32") << name;
    ours[name.substr(std::strlen("transformer."))] = entry.shape;
  }
  EXPECT_TRUE(ours == PublishedGpt2(12, 768, 50257, 1024));
}

TEST_F(HuggingFace, AWiderExportTakesTheMasters) {
  for (const bool split : {false, true}) {
    const std::string masters = split ? "split" : "whole", wide_path = Path(masters + "_wide"),
                      narrow_path = Path(masters + "_narrow");
    const std::string save = Save(Small("llama", false), DType::kBF16, masters, split);
    ExportHuggingFace(save, wide_path, {.dtype = DType::kF32});
    ExportHuggingFace(save, narrow_path, {});
    const SafetensorsFile wide(wide_path + "/model.safetensors"),
        narrow(narrow_path + "/model.safetensors");
    for (const auto& [name, entry] : wide.entries()) {
      EXPECT_EQ(entry.type, "F32");
      EXPECT_EQ(narrow.entries().at(name).type, "BF16");
      EXPECT_EQ(Stored(wide, name)[0], 1 + 0x1p-20) << name;
    }
  }
}

// Whatever a rank holds of a parameter, it reads that, and not much more.
TEST_F(HuggingFace, EveryCutReadsItsPart) {
  std::mt19937 random(3);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random()) % n; };
  for (const ModelConfig& config : Models()) {
    const std::string out = Path(config.family + (config.tied ? "_tied" : ""));
    ExportHuggingFace(Save(config, DType::kF32, out + "_saves"), out, {.shard_bytes = 9000});
    const HuggingFaceModel theirs(out);
    const auto built = BuildModel(config);
    for (const auto& p : built->Parameters()) p->Materialize(DType::kF64);
    EXPECT_EQ(theirs.Load(ModelState(*built)), 4 * ParameterCount(config));
    for (const auto& p : built->Parameters()) {
      const Dims global = p->global_shape();
      for (int i = 0; i < 12; ++i) {
        Dims offset = global, slice = global;
        for (int d = 0; d < global.rank(); ++d) {
          offset[d] = below(global[d]);
          slice[d] = 1 + below(global[d] - offset[d]);
        }
        Tensor expected = p->value();
        for (int d = 0; d < global.rank(); ++d)
          expected = expected.Narrowed(d, offset[d], slice[d]);
        expected = expected.Clone();
        StateEntry entry = {"model/" + p->name(), Tensor::Empty(slice, DType::kF32), global,
                            offset};
        if (i % 2 == 1) {
          const int64_t begin = below(slice.numel()), count = 1 + below(slice.numel() - begin);
          expected = expected.Reshaped({-1}).Narrowed(0, begin, count);
          entry.tensor = Tensor::Empty({count}, DType::kF32);
          entry.share = {slice, begin};
        }
        const int64_t bytes = theirs.Load({entry});
        EXPECT_TRUE(entry.tensor.ToVector() == expected.ToVector())
            << p->name() << slice.ToString() << " from " << offset.ToString();
        // A share begins and ends within a row.
        EXPECT_LE(bytes, 4 * (expected.numel() + 2 * slice[-1])) << p->name();
      }
    }
  }
}

// GPT-2 as first published: without the prefix of the outer model, and with the masks' buffers.
TEST_F(HuggingFace, FilesOfTheInnerModelAreRead) {
  const std::string save = Save(Small("gpt2", true), DType::kF32);
  ExportHuggingFace(save, Path("out"), {});
  const LoadedModel before = LoadModel(Path("out"));
  // The same bytes under shorter names: the header is rewritten in place.
  std::string bytes = ReadText(Path("out/model.safetensors"));
  for (size_t at = bytes.find("transformer."); at != std::string::npos;
       at = bytes.find("transformer.", at)) {
    const size_t close = bytes.find('}', at);
    bytes.erase(at, std::strlen("transformer."));
    bytes.insert(close + 1 - std::strlen("transformer."), std::string(12, ' '));
  }
  std::ofstream(Path("out/model.safetensors"), std::ios::binary) << bytes;
  EXPECT_TRUE(SafetensorsFile(Path("out/model.safetensors")).entries().contains("wte.weight"));
  const LoadedModel after = LoadModel(Path("out"));
  const auto a = before.model->Parameters(), b = after.model->Parameters();
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_TRUE(a[i]->value().ToVector() == b[i]->value().ToVector()) << a[i]->name();
}

}  // namespace
}  // namespace shoal
