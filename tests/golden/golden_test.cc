// Models and ops against numbers made with PyTorch in f64; README.md here describes the files.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "core/ops.h"
#include "launch/training_step.h"
#include "tests/core/gradient_check.h"

namespace shoal {
namespace {

using nlohmann::json;

// Agreement of f64 programs that add in different orders.
constexpr double kTolerance = 1e-10;

uint64_t Word(const std::string& stream, uint64_t index) {
  uint64_t z = HashName(stream) + (index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

double Value(const std::string& stream, uint64_t index, const json& range) {
  return range.at("offset").get<double>() +
         range.at("scale").get<double>() *
             (static_cast<double>(Word(stream, index) >> 48) / 65536.0 - 0.5);
}

// Against l2, sum and samples. `floor` is what a tensor's size is at least taken for: one that is
// zero but for rounding has no digits of its own.
void ExpectLike(const std::vector<double>& values, const json& golden, double floor,
                const std::string& what) {
  const double size = std::max(golden.at("l2").get<double>(), floor);
  double sum = 0, squares = 0;
  for (double v : values) {
    sum += v;
    squares += v * v;
  }
  const double n = std::sqrt(static_cast<double>(values.size()));
  EXPECT_NEAR(std::sqrt(squares), golden.at("l2").get<double>(), kTolerance * size)
      << what << " l2";
  EXPECT_NEAR(sum, golden.at("sum").get<double>(), kTolerance * size * n) << what << " sum";
  for (const json& sample : golden.at("samples")) {
    EXPECT_NEAR(values.at(sample[0].get<size_t>()), sample[1].get<double>(), kTolerance * size)
        << what << " at " << sample[0];
  }
}

std::vector<int32_t> Flat(const json& rows) {
  std::vector<int32_t> flat;
  for (const json& row : rows) {
    if (row.is_array()) {
      for (const json& v : row) flat.push_back(v);
    } else {
      flat.push_back(row);
    }
  }
  return flat;
}

class ModelCase {
 public:
  explicit ModelCase(json golden) : golden_(std::move(golden)) {
    const json& c = golden_.at("config");
    model_.family = c.at("family");
    model_.layers = c.at("layers");
    model_.d_model = c.at("d_model");
    model_.heads = c.at("heads");
    model_.kv_heads = c.at("kv_heads");
    model_.head_dim = model_.d_model / model_.heads;
    model_.mlp = c.at("mlp");
    model_.vocab = c.at("vocab");
    model_.context = c.at("context");
    model_.tied = c.at("tied");
    model_.norm_eps = c.at("eps");
    model_.rope_theta = c.at("theta");
  }

  // Step s draws [B, T + 1] ids; tokens are the first T of a row, labels the last T.
  Batch MakeBatch(int64_t step) const {
    Batch batch;
    batch.count = golden_.at("batch");
    batch.length = golden_.at("sequence_length");
    if (golden_.contains("documents")) batch.documents = Flat(golden_.at("documents"));
    const std::string stream =
        golden_.at("name").get<std::string>() + ".tokens." + std::to_string(step);
    for (int64_t b = 0; b < batch.count; ++b) {
      for (int64_t t = 0; t < batch.length; ++t) {
        const auto id = [&](int64_t at) {
          const uint64_t word = Word(stream, static_cast<uint64_t>(b * (batch.length + 1) + at));
          return static_cast<int32_t>((word >> 32) % static_cast<uint64_t>(model_.vocab));
        };
        batch.tokens.push_back(id(t));
        const size_t i = batch.tokens.size() - 1;
        const bool ends = !batch.documents.empty() && t + 1 < batch.length &&
                          batch.documents[i] != batch.documents[i + 1];
        batch.labels.push_back(ends ? kIgnoredLabel : id(t + 1));
        batch.labelled += !ends;
        batch.positions.push_back(static_cast<int32_t>(t));
        batch.token_numbers.push_back(static_cast<int64_t>(i));
      }
    }
    return batch;
  }

  std::unique_ptr<TrainingStep> Start(const UpdateRuleOptions& rule, double clip) {
    TrainingOptions options;
    options.model = model_;
    options.compute = options.gradients = DType::kF64;
    options.rule = rule;
    options.clip = clip;
    auto step = std::make_unique<TrainingStep>(options, *self_);
    for (const auto& p : step->model().Parameters()) {
      const bool norm = p->name().find("norm.weight") != std::string::npos;
      const json& range = golden_.at("weights").at(norm                          ? "norm"
                                                   : p->name().ends_with("bias") ? "bias"
                                                                                 : "matrix");
      double* values = p->value().data<double>();
      for (int64_t i = 0; i < p->value().numel(); ++i)
        values[i] = Value(p->name(), static_cast<uint64_t>(i), range);
    }
    return step;
  }

  void CheckGradients() {
    const auto step = Start({}, 0);
    const Batch batch = MakeBatch(0);
    ASSERT_EQ(batch.tokens, Flat(golden_.at("tokens")));
    ASSERT_EQ(batch.labels, Flat(golden_.at("labels")));
    const Dims shape = {batch.count, batch.length};
    SequenceInfo info;
    info.positions = Tensor::From(batch.positions, shape);
    if (!batch.documents.empty()) info.documents = Tensor::From(batch.documents, shape);
    LanguageModel& model = step->model();
    const Tensor loss =
        model.Loss(model.Hidden(Tensor::From(batch.tokens, shape), info),
                   Tensor::From(batch.labels, shape), static_cast<double>(batch.labelled));
    Backward(loss);
    const double norm = golden_.at("grad_norm");
    EXPECT_NEAR(loss.Item(), golden_.at("loss").get<double>(), kTolerance * loss.Item());
    EXPECT_NEAR(step->optimizer().GradNorm(), norm, kTolerance * norm);
    const json& parameters = golden_.at("parameters");
    EXPECT_EQ(model.Parameters().size(), parameters.size());
    for (const auto& p : model.Parameters()) {
      ASSERT_TRUE(parameters.contains(p->name())) << p->name();
      const json& golden = parameters.at(p->name());
      EXPECT_EQ(p->decays(), golden.at("decayed").get<bool>()) << p->name();
      ExpectLike(p->leaf().grad.ToVector(), golden.at("gradient"), norm, p->name());
    }
  }

  void CheckSteps(const std::string& rule) {
    const json& g = golden_.at(rule);
    UpdateRuleOptions options;
    options.name = rule;
    options.weight_decay = g.at("weight_decay");
    options.momentum = g.value("momentum", 0.0);
    options.beta1 = g.value("beta1", 0.0);
    options.beta2 = g.value("beta2", 0.0);
    options.eps = g.value("eps", 0.0);
    const auto step = Start(options, g.at("clip"));
    const int64_t steps = golden_.at("steps");
    for (int64_t s = 0; s < steps; ++s) {
      const Batch batch = MakeBatch(s);
      const TrainingStep::Result result = step->Run(std::span(&batch, 1), g.at("lr"));
      const double loss = g.at("losses")[static_cast<size_t>(s)],
                   norm = g.at("grad_norms")[static_cast<size_t>(s)];
      EXPECT_NEAR(result.loss, loss, kTolerance * loss) << rule << " step " << s;
      EXPECT_NEAR(result.grad_norm, norm, kTolerance * norm) << rule << " step " << s;
    }
    const double moved = static_cast<double>(steps) * g.at("lr").get<double>();
    for (const auto& p : step->model().Parameters()) {
      // GPT-2's key bias has a gradient of rounding only, which AdamW blows up to steps of lr.
      if (rule == "adamw" && p->name().ends_with("k.bias")) continue;
      ExpectLike(p->value().ToVector(), g.at("parameters").at(p->name()), moved,
                 rule + " " + p->name());
    }
  }

 private:
  json golden_;
  ModelConfig model_;
  std::unique_ptr<Communicator> self_ = MakeSelfCommunicator();
};

class OpCase {
 public:
  explicit OpCase(json golden) : golden_(std::move(golden)) {
    for (const auto& [name, input] : golden_.at("inputs").items()) {
      Dims shape;
      for (int64_t extent : input.at("shape")) shape.push_back(extent);
      std::vector<double> values(static_cast<size_t>(shape.numel()));
      for (size_t i = 0; i < values.size(); ++i) values[i] = Value(input.at("stream"), i, input);
      inputs_.emplace(name, testing::Variable(Tensor::From(values, shape)));
    }
  }

  void Check() {
    const std::string op = golden_.at("op");
    const json& o = golden_.at("options");
    Tensor out;
    if (op == "gelu") out = ops::Gelu(Use("x"));
    if (op == "swiglu") out = ops::SwiGlu(Use("gate"), Use("up"));
    if (op == "rms_norm") out = ops::RmsNorm(Use("x"), Use("weight"), o.at("eps"));
    if (op == "layer_norm") out = ops::LayerNorm(Use("x"), Use("weight"), Use("bias"), o.at("eps"));
    if (op == "rope") out = ops::Rope(Use("x"), Integers("positions"), o.at("theta"));
    if (op == "attention") {
      kernels::AttentionOptions options;
      options.scale = o.at("scale");
      options.causal = o.at("causal");
      options.window = o.at("window");
      options.query_offset = o.at("query_offset");
      const auto result = ops::Attention(Use("q"), Use("k"), Use("v"), Integers("q_document"),
                                         Integers("k_document"), options);
      out = result.out;
      Expect("lse", result.lse);
    }
    if (op == "linear_cross_entropy") {
      const double scale = o.at("gradient_scale");
      const Tensor loss =
          ops::LinearCrossEntropy(Use("x"), Use("w"), Integers("labels"), 1 / scale);
      const double sum = golden_.at("outputs").at("losses").at("sum");
      EXPECT_NEAR(loss.Item(), sum * scale, kTolerance * sum * scale);
      Backward(loss);
    } else {
      ASSERT_TRUE(out.defined()) << "no op " << op;
      Expect("out", out);
      Backward(out, inputs_.at("dout").value);
    }
    for (const auto& [name, gradient] : golden_.at("gradients").items()) {
      ExpectLike(inputs_.at(name).leaf->grad.ToVector(), gradient, 1e-3, "gradient of " + name);
    }
  }

 private:
  Tensor Use(const std::string& name) const { return inputs_.at(name).Use(); }
  // As [rows, columns]; undefined if the case has none of that name.
  Tensor Integers(const std::string& name) const {
    const json& all = golden_.at("integers");
    if (!all.contains(name)) return {};
    const std::vector<int32_t> flat = Flat(all.at(name));
    const int64_t n = static_cast<int64_t>(flat.size());
    const int64_t rows = all.at(name)[0].is_array() ? static_cast<int64_t>(all.at(name).size()) : 1;
    return Tensor::From(flat, {rows, n / rows});
  }
  void Expect(const std::string& name, const Tensor& t) const {
    ExpectLike(t.ToVector(), golden_.at("outputs").at(name), 1e-3, name);
  }

  json golden_;
  std::map<std::string, testing::Variable> inputs_;
};

std::vector<std::string> Files(const std::string& kind) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(SHOAL_SOURCE_DIR "/tests/golden")) {
    if (entry.path().extension() != ".json") continue;
    if (json::parse(std::ifstream(entry.path())).at("kind") == kind)
      names.push_back(entry.path().stem());
  }
  std::sort(names.begin(), names.end());
  return names;
}

json Load(const std::string& name) {
  return json::parse(std::ifstream(fmt::format("{}/tests/golden/{}.json", SHOAL_SOURCE_DIR, name)));
}

std::string TestName(const ::testing::TestParamInfo<std::string>& info) { return info.param; }

class GoldenModel : public ::testing::TestWithParam<std::string> {};
TEST_P(GoldenModel, Gradients) { ModelCase(Load(GetParam())).CheckGradients(); }
TEST_P(GoldenModel, AdamWSteps) { ModelCase(Load(GetParam())).CheckSteps("adamw"); }
TEST_P(GoldenModel, SgdSteps) { ModelCase(Load(GetParam())).CheckSteps("sgd"); }
INSTANTIATE_TEST_SUITE_P(All, GoldenModel, ::testing::ValuesIn(Files("model")), TestName);

class GoldenOp : public ::testing::TestWithParam<std::string> {};
TEST_P(GoldenOp, OutputsAndGradients) { OpCase(Load(GetParam())).Check(); }
INSTANTIATE_TEST_SUITE_P(All, GoldenOp, ::testing::ValuesIn(Files("op")), TestName);

}  // namespace
}  // namespace shoal
