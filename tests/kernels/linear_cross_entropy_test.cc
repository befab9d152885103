// What the list of cases cannot say: labels that are refused, and memory.
#include "kernels/linear_cross_entropy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

namespace shoal::kernels {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class CountingScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t bytes) override {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    sizes_.emplace_back(data, bytes);
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return data;
  }
  void FreeScratch(void* data) override {
    for (auto& [d, bytes] : sizes_) {
      if (d != data) continue;
      live_ -= bytes;
      d = nullptr;
    }
    std::free(data);
  }
  size_t live() const { return live_; }
  size_t peak() const { return peak_; }

 private:
  std::vector<std::pair<void*, size_t>> sizes_;
  size_t live_ = 0, peak_ = 0;
};

// M tokens of D into V, all arrays in f32, or what they hold taken for bf16.
struct Head {
  int64_t tokens, depth, vocab;
  std::vector<float> losses, dx, dw, x, w;
  std::vector<int32_t> labels;
  CountingScratch scratch;

  Head(int64_t tokens, int64_t depth, int64_t vocab)
      : tokens(tokens),
        depth(depth),
        vocab(vocab),
        losses(tokens),
        dx(tokens * depth),
        dw(vocab * depth),
        x(tokens * depth, 0.5f),
        w(vocab * depth, 0.25f),
        labels(tokens) {}
  void Run(bool with_dx, bool with_dw, int64_t chunk, DType t = DType::kF32) {
    Stream stream;
    stream.scratch = &scratch;
    LinearCrossEntropy(stream, View(losses.data(), DType::kF32, {tokens}),
                       with_dx ? View(dx.data(), t, {tokens, depth}) : View(),
                       with_dw ? View(dw.data(), t, {vocab, depth}) : View(), false,
                       View(x.data(), t, {tokens, depth}), View(w.data(), t, {vocab, depth}),
                       View(labels.data(), DType::kI32, {tokens}),
                       {.gradient_scale = 1, .chunk_tokens = chunk});
  }
};

TEST(LinearCrossEntropy, NamesTheRowAndTheValueOfALabelThatIsTooLarge) {
  Head head(7, 3, 65);
  head.labels[5] = 65;
  try {
    head.Run(true, true, 2);
    ADD_FAILURE() << "accepts label 65 of 65";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kData);
    EXPECT_THAT(e.message(), AllOf(HasSubstr("row 5"), HasSubstr("label 65"), HasSubstr("65 ent")));
  }
  EXPECT_EQ(head.scratch.live(), 0u);
  head.labels[5] = 64;
  head.Run(true, true, 2);
}

TEST(LinearCrossEntropy, RefusesAChunkOfNothing) {
  Head head(7, 3, 65);
  EXPECT_THROW(head.Run(true, true, 0), Error);
}

// A frozen head, or a frozen body.
TEST(LinearCrossEntropy, EitherGradientMayBeAbsent) {
  Head both(9, 5, 33), input(9, 5, 33), weight(9, 5, 33);
  for (Head* head : {&both, &input, &weight})
    for (int i = 0; i < 45; ++i) head->x[i] = 0.1f * static_cast<float>(i % 7);
  both.Run(true, true, 4);
  input.Run(true, false, 4);
  weight.Run(false, true, 4);
  EXPECT_EQ(input.dx, both.dx);
  EXPECT_EQ(weight.dw, both.dw);
  EXPECT_EQ(input.losses, both.losses);
  EXPECT_EQ(weight.losses, both.losses);
}

// However many labels are ignored, and where.
TEST(LinearCrossEntropy, TakesTheSameMemoryForAnyLabels) {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    for (const bool with_dx : {true, false}) {
      // Several chunks, of which bf16 gradients hold all; several whose sum is wide; one.
      for (const int64_t chunk : {33, 7, 100}) {
        size_t all = 0;
        for (const int ignored : {0, 1, 60, 99}) {
          Head head(100, 40, chunk == 7 ? 9000 : 129);
          for (int i = 0; i < ignored; ++i) head.labels[i * 37 % 100] = -1;
          head.Run(with_dx, true, chunk, type);
          if (ignored == 0) all = head.scratch.peak();
          EXPECT_EQ(head.scratch.peak(), all)
              << Name(type) << ' ' << with_dx << ' ' << chunk << ' ' << ignored;
        }
      }
    }
  }
}

// Of [tokens, vocab] a chunk is held; for the loss alone a block of its columns.
TEST(LinearCrossEntropy, HoldsAChunkOfLogits) {
  Head head(100, 8, 20001);
  head.Run(true, true, 32);
  EXPECT_LT(head.scratch.peak(), 32 * 20001 * sizeof(float) * 5 / 4);
  Head evaluation(100, 8, 20001);
  evaluation.Run(false, false, 32);
  EXPECT_LT(evaluation.scratch.peak(), head.scratch.peak() / 2);
  EXPECT_NEAR(evaluation.losses[3], std::log(20001.0), 1e-4);
}

}  // namespace
}  // namespace shoal::kernels
