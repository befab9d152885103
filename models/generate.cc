#include "models/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/base/philox.h"

namespace shoal {
namespace {

int32_t Sample(std::vector<double> logits, const GenerateOptions& options, uint64_t index) {
  if (options.vocab_limit > 0 && options.vocab_limit < static_cast<int64_t>(logits.size())) {
    logits.resize(static_cast<size_t>(options.vocab_limit));
  }
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  if (options.temperature == 0) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  // Equal logits in order of id, so that the choice is the same everywhere.
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] != logits[static_cast<size_t>(b)]
               ? logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)]
               : a < b;
  });
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(order.size())) {
    order.resize(static_cast<size_t>(options.top_k));
  }
  std::vector<double> weights;
  const double highest = logits[static_cast<size_t>(order[0])];
  SHOAL_CHECK(std::isfinite(highest), "generate", "the model's logits are not finite");
  for (int32_t id : order)
    weights.push_back(std::exp((logits[static_cast<size_t>(id)] - highest) / options.temperature));
  double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  if (options.top_p < 1) {
    double kept = 0;
    size_t n = 0;
    while (n < weights.size() && kept < options.top_p * total) kept += weights[n++];
    weights.resize(std::max<size_t>(n, 1));
    total = std::accumulate(weights.begin(), weights.end(), 0.0);
  }
  double u = PhiloxWord({options.seed, HashName("generate")}, index) * 0x1p-32 * total;
  for (size_t i = 0; i < weights.size(); ++i) {
    u -= weights[i];
    if (u < 0) return order[i];
  }
  return order[weights.size() - 1];
}

}  // namespace

std::vector<int32_t> Generate(LanguageModel& model, std::span<const int32_t> prompt,
                              const GenerateOptions& options,
                              const std::function<void(int32_t)>& on_token) {
  SHOAL_CHECK(!prompt.empty(), "generate", "the prompt holds no token");
  const NoGrad no_grad;
  const int64_t context = model.config().context;
  const DType dtype = model.Parameters()[0]->value().dtype();
  std::vector<int32_t> text(prompt.begin(), prompt.end());
  std::vector<int32_t> fresh(
      text.end() - std::min<int64_t>(context, static_cast<int64_t>(text.size())), text.end());
  KvCache cache = model.MakeCache(1, context, dtype);
  SequenceInfo info;
  info.cache = &cache;
  std::vector<int32_t> generated;
  while (static_cast<int64_t>(generated.size()) < options.tokens) {
    if (cache.length + static_cast<int64_t>(fresh.size()) > context) {
      fresh.assign(text.end() - std::max<int64_t>(context / 2, 1), text.end());
      cache.length = 0;
    }
    const int64_t t = static_cast<int64_t>(fresh.size());
    std::vector<int32_t> positions(fresh.size());
    std::iota(positions.begin(), positions.end(), static_cast<int32_t>(cache.length));
    info.positions = Tensor::From(positions, {1, t});
    const Tensor hidden = model.Hidden(Tensor::From(fresh, {1, t}), info);
    cache.length += t;
    const Tensor last = hidden.Narrowed(1, t - 1, 1).Clone();
    const int32_t id = Sample(model.Logits(last).ToVector(), options, generated.size());
    if (id == options.stop) break;
    generated.push_back(id);
    text.push_back(id);
    fresh = {id};
    if (on_token) on_token(id);
  }
  return generated;
}

}  // namespace shoal
