#include "launch/hugging_face_config.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <nlohmann/json.hpp>

namespace shoal {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr int64_t kLargestJson = 64'000'000;  // bytes
constexpr double kLargestSize = 1e9;          // of one dimension

// A value as part of a message.
std::string Shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  constexpr size_t kLongest = 100;
  return text.size() > kLongest ? text.substr(0, kLongest) + ".." : text;
}

// The keys of one object, each with the value it has where it is left out.
class Keys {
 public:
  Keys(std::string path, const json& object, std::string within = "")
      : path_(std::move(path)), object_(object), within_(std::move(within)) {}

  bool Has(const char* key) const {
    const auto found = object_.find(key);
    return found != object_.end() && !found->is_null();
  }
  const json& At(const char* key) const { return object_.at(key); }

  int64_t Size(const char* key, std::optional<int64_t> otherwise = std::nullopt) const {
    if (!Has(key)) {
      if (!otherwise) Fail(fmt::format("has no {}", within_ + key));
      return *otherwise;
    }
    const json& value = At(key);
    const double number = value.is_number_integer() ? value.get<double>() : 0;
    if (number < 1 || number > kLargestSize)
      Refuse(key, fmt::format("it takes an integer from 1 to {:.0e}", kLargestSize));
    return value.get<int64_t>();
  }
  double Number(const char* key, double otherwise, double low, double high) const {
    if (!Has(key)) return otherwise;
    const json& value = At(key);
    const double number = value.is_number() ? value.get<double>() : NAN;
    if (!(number >= low && number <= high))
      Refuse(key, fmt::format("it takes a number from {} to {}", low, high));
    return number;
  }
  bool Flag(const char* key, bool otherwise) const {
    if (!Has(key)) return otherwise;
    if (!At(key).is_boolean()) Refuse(key, "it takes true or false");
    return At(key).get<bool>();
  }
  // The first of `allowed` is what a key that is left out means.
  void Must(const char* key, std::initializer_list<json> allowed) const {
    if (!Has(key)) return;
    std::string names;
    for (const json& value : allowed) {
      if (At(key) == value) return;
      names += (names.empty() ? "" : " or ") + Shown(value);
    }
    Refuse(key, "Shoal has " + names);
  }
  void MustNotHave(const char* key) const {
    if (Has(key)) Refuse(key, "Shoal does not have it");
  }

  [[noreturn]] void Refuse(const char* key, const std::string& why) const {
    Fail(fmt::format("{} is {}: {}", within_ + key, Shown(At(key)), why));
  }
  [[noreturn]] void Fail(const std::string& what) const {
    SHOAL_FAIL(ErrorKind::kConfig, "model", "{}: {}", path_, what);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const json& object_;
  std::string within_;
};

// Of the three places where one may be: the old key, and the object that has had two names.
double RopeTheta(const Keys& keys) {
  constexpr double kDefault = 10000, kLargest = 1e15;
  std::optional<double> theta;
  if (keys.Has("rope_theta")) theta = keys.Number("rope_theta", kDefault, 1, kLargest);
  for (const char* name : {"rope_parameters", "rope_scaling"}) {
    if (!keys.Has(name)) continue;
    if (!keys.At(name).is_object()) keys.Refuse(name, "it takes an object");
    const Keys rope(keys.path(), keys.At(name), std::string(name) + ".");
    rope.Must("rope_type", {"default"});
    rope.Must("type", {"default"});
    for (const char* scaling : {"factor", "short_factor", "long_factor", "low_freq_factor"})
      rope.MustNotHave(scaling);
    rope.Must("partial_rotary_factor", {1});
    if (!rope.Has("rope_theta")) continue;
    const double found = rope.Number("rope_theta", kDefault, 1, kLargest);
    if (theta && *theta != found) rope.Refuse("rope_theta", "rope_theta says otherwise");
    theta = found;
  }
  return theta.value_or(kDefault);
}

ModelConfig ReadLlama(const Keys& keys) {
  keys.Must("model_type", {"llama"});
  keys.Must("hidden_act", {"silu", "swish"});
  for (const char* key : {"attention_bias", "mlp_bias"}) keys.Must(key, {false});
  keys.Must("partial_rotary_factor", {1});
  for (const char* key : {"sliding_window", "attention_chunk_size"}) keys.MustNotHave(key);
  ModelConfig c;
  c.family = "llama";
  c.layers = keys.Size("num_hidden_layers");
  c.d_model = keys.Size("hidden_size");
  c.heads = keys.Size("num_attention_heads");
  c.kv_heads = keys.Size("num_key_value_heads", c.heads);
  if (!keys.Has("head_dim") && c.d_model % c.heads != 0)
    keys.Refuse("num_attention_heads", "it does not divide hidden_size, and there is no head_dim");
  c.head_dim = keys.Size("head_dim", c.d_model / c.heads);
  c.mlp = keys.Size("intermediate_size");
  c.vocab = keys.Size("vocab_size");
  c.context = keys.Size("max_position_embeddings", 2048);
  c.tied = keys.Flag("tie_word_embeddings", false);
  c.rope_theta = RopeTheta(keys);
  c.attention_dropout = keys.Number("attention_dropout", 0.0, 0, std::nextafter(1, 0));
  c.norm_eps = keys.Number("rms_norm_eps", 1e-6, 0, 0.5);
  return c;
}

ModelConfig ReadGpt2(const Keys& keys) {
  keys.Must("model_type", {"gpt2"});
  // Both names are the tanh form; "gelu" is the exact one.
  keys.Must("activation_function", {"gelu_new", "gelu_pytorch_tanh"});
  keys.Must("scale_attn_weights", {true});
  for (const char* key : {"scale_attn_by_inverse_layer_idx", "add_cross_attention"})
    keys.Must(key, {false});
  ModelConfig c;
  c.family = "gpt2";
  c.layers = keys.Size("n_layer");
  c.d_model = keys.Size("n_embd");
  c.heads = c.kv_heads = keys.Size("n_head");
  if (c.d_model % c.heads != 0) keys.Refuse("n_head", "it does not divide n_embd");
  c.head_dim = c.d_model / c.heads;
  c.mlp = keys.Size("n_inner", 4 * c.d_model);
  c.vocab = keys.Size("vocab_size");
  c.context = keys.Size("n_positions", 1024);
  keys.Must("n_ctx", {c.context});
  c.tied = keys.Flag("tie_word_embeddings", true);
  c.dropout = keys.Number("resid_pdrop", 0.1, 0, std::nextafter(1, 0));
  c.attention_dropout = keys.Number("attn_pdrop", 0.1, 0, std::nextafter(1, 0));
  c.norm_eps = keys.Number("layer_norm_epsilon", 1e-5, 0, 0.5);
  return c;
}

const char* TorchName(DType dtype) {
  return dtype == DType::kF64 ? "float64" : dtype == DType::kBF16 ? "bfloat16" : "float32";
}

}  // namespace

json ReadJsonObject(const std::string& path) {
  const auto fail = [&](const std::string& what) {
    SHOAL_FAIL(ErrorKind::kStorage, "model", "{}: {}", path, what);
  };
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) fail("is not a file that can be read");
  if (static_cast<int64_t>(std::filesystem::file_size(path, error)) > kLargestJson)
    fail(fmt::format("is larger than the {} bytes that it may have", kLargestJson));
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(fmt::format("cannot be read: {}", std::strerror(errno)));
  // What is nested deeper than any such file has no meaning here, and costs memory.
  constexpr int kDeepest = 16;
  bool deep = false;
  json object = json::parse(
      in,
      [&](int depth, json::parse_event_t, json&) {
        deep = deep || depth > kDeepest;
        return !deep;
      },
      false);
  if (deep || !object.is_object()) fail("is no JSON object, or is damaged");
  return object;
}

ModelConfig ReadHuggingFaceConfig(const std::string& path) {
  const json object = ReadJsonObject(path);
  const Keys keys(path, object);
  if (!keys.Has("architectures")) keys.Fail("has no architectures");
  const json& architectures = keys.At("architectures");
  const bool llama = architectures == json::array({"LlamaForCausalLM"});
  if (!llama && architectures != json::array({"GPT2LMHeadModel"}))
    keys.Refuse("architectures", "Shoal has LlamaForCausalLM and GPT2LMHeadModel");
  keys.MustNotHave("quantization_config");
  keys.Must("is_encoder_decoder", {false});
  const ModelConfig model = llama ? ReadLlama(keys) : ReadGpt2(keys);
  try {
    CheckModelConfig(model);
  } catch (const Error& e) {
    keys.Fail(e.message());
  }
  return model;
}

std::string HuggingFaceConfigJson(const ModelConfig& c, DType dtype,
                                  std::optional<int64_t> end_of_document) {
  ordered_json object;
  if (c.family == "llama") {
    object = {{"architectures", {"LlamaForCausalLM"}},
              {"model_type", "llama"},
              {"hidden_size", c.d_model},
              {"num_hidden_layers", c.layers},
              {"num_attention_heads", c.heads},
              {"num_key_value_heads", c.kv_heads},
              {"head_dim", c.head_dim},
              {"intermediate_size", c.mlp},
              {"max_position_embeddings", c.context},
              {"rms_norm_eps", c.norm_eps},
              {"rope_theta", c.rope_theta},
              {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", c.rope_theta}}},
              {"hidden_act", "silu"},
              {"attention_bias", false},
              {"attention_dropout", c.attention_dropout},
              {"mlp_bias", false}};
  } else {
    if (c.heads * c.head_dim != c.d_model)
      SHOAL_FAIL(ErrorKind::kConfig, "model",
                 "GPT2LMHeadModel has heads of n_embd / n_head, and this model {} of {} under {}",
                 c.heads, c.head_dim, c.d_model);
    object = {{"architectures", {"GPT2LMHeadModel"}},
              {"model_type", "gpt2"},
              {"n_embd", c.d_model},
              {"n_layer", c.layers},
              {"n_head", c.heads},
              {"n_inner", c.mlp},
              {"n_positions", c.context},
              {"n_ctx", c.context},
              {"layer_norm_epsilon", c.norm_eps},
              {"activation_function", "gelu_new"},
              {"resid_pdrop", c.dropout},
              {"embd_pdrop", c.dropout},
              {"attn_pdrop", c.attention_dropout},
              {"scale_attn_weights", true},
              {"scale_attn_by_inverse_layer_idx", false},
              {"reorder_and_upcast_attn", false}};
  }
  object.update({{"vocab_size", c.vocab},
                 {"tie_word_embeddings", c.tied},
                 {"initializer_range", 0.02},
                 {"use_cache", true},
                 {"bos_token_id", nullptr},
                 {"eos_token_id", nullptr},
                 {"pad_token_id", nullptr},
                 {"torch_dtype", TorchName(dtype)},
                 {"dtype", TorchName(dtype)}});
  // A text begins where another ends.
  if (end_of_document) object["bos_token_id"] = object["eos_token_id"] = *end_of_document;
  return object.dump(2) + '\n';
}

}  // namespace shoal
