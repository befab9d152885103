#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "core/base/dims.h"
#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/philox.h"
#include "core/base/view.h"

namespace shoal {
namespace {

// The known answers that the authors of Philox publish with it.
TEST(Philox, KnownAnswers) {
  const auto expect = [](PhiloxKey key, uint64_t counter, const Philox4& answer) {
    const Philox4 words = Philox(key, counter);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(words.v[i], answer.v[i]) << i;
  };
  expect({0, 0}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  expect({~0ull, ~0ull}, ~0ull, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect({0x299f31d0a4093822ull, 0x0370734413198a2eull}, 0x85a308d3243f6a88ull,
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(Philox, WordsAreByGlobalIndex) {
  const PhiloxKey key = {3, 4};
  for (uint64_t i = 0; i < 20; ++i) EXPECT_EQ(PhiloxWord(key, i), Philox(key, i / 4).v[i % 4]);
  EXPECT_LT(UniformFromWord(0xffffffffu), 1.0f);
  EXPECT_EQ(UniformFromWord(0), 0.0f);
}

TEST(BF16, RoundsToNearestEven) {
  EXPECT_EQ(BF16(1.0f).bits, 0x3f80);
  EXPECT_EQ(static_cast<float>(BF16(1.0f + 0x1p-8f)), 1.0f);           // a tie, down to even
  EXPECT_EQ(static_cast<float>(BF16(1.0f + 3 * 0x1p-8f)), 1.015625f);  // a tie, up to even
  EXPECT_EQ(static_cast<float>(BF16(1.0f + 0x1.01p-8f)), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(static_cast<float>(BF16(std::nanf("")))));
  EXPECT_EQ(static_cast<float>(BF16(std::numeric_limits<float>::infinity())),
            std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isinf(static_cast<float>(BF16(std::numeric_limits<float>::max()))));
}

TEST(F16, RoundTripsEveryValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    F16 h;
    h.bits = static_cast<uint16_t>(bits);
    const float f = static_cast<float>(h);
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(F16(f))));
    } else {
      EXPECT_EQ(F16(f).bits, h.bits) << bits;
    }
  }
}

TEST(F16, RoundsAndOverflows) {
  EXPECT_EQ(static_cast<float>(F16(65504.0f)), 65504.0f);
  EXPECT_TRUE(std::isinf(static_cast<float>(F16(65520.0f))));
  EXPECT_EQ(static_cast<float>(F16(65519.0f)), 65504.0f);
  EXPECT_EQ(static_cast<float>(F16(0x1p-25f)), 0.0f);         // a tie, down to even
  EXPECT_EQ(static_cast<float>(F16(0x1.8p-25f)), 0x1p-24f);   // the smallest subnormal
  EXPECT_EQ(static_cast<float>(F16(1.0f + 0x1p-11f)), 1.0f);  // a tie, down to even
  EXPECT_EQ(static_cast<float>(F16(-0.0f)), 0.0f);
  EXPECT_TRUE(std::signbit(static_cast<float>(F16(-0.0f))));
}

TEST(Dims, StridesAndNegativeIndices) {
  const Dims d = {2, 3, 4};
  EXPECT_EQ(d[-1], 4);
  EXPECT_EQ(d.numel(), 24);
  EXPECT_EQ(d.RowMajorStrides(), (Dims{12, 4, 1}));
  EXPECT_EQ(d.ToString(), "[2, 3, 4]");
  EXPECT_EQ((Dims{}).numel(), 1);
  EXPECT_EQ((Dims{3, 0}).numel(), 0);
  EXPECT_THROW((Dims{1, 1, 1, 1, 1, 1, 1}), Error);
}

TEST(View, NarrowAndTransposeMoveNothing) {
  float data[6] = {};
  const View v(data, DType::kF32, {2, 3});
  EXPECT_TRUE(v.contiguous());
  EXPECT_FALSE(v.Transposed().contiguous());
  EXPECT_EQ(v.Narrow(0, 1, 1).data, data + 3);
  EXPECT_EQ(v.Narrow(1, 2, 1).data, data + 2);
  EXPECT_FALSE(View());
}

TEST(Error, NamesOpMessageAndRank) {
  SetThreadRank(3);
  try {
    SHOAL_CHECK(1 == 2, "matmul", "dimensions {} and {} differ", 1, 2);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kBug);
    EXPECT_EQ(e.rank(), 3);
    EXPECT_EQ(e.message(), "dimensions 1 and 2 differ");
    EXPECT_NE(std::strstr(e.what(), "[matmul] dimensions 1 and 2 differ (rank 3, "), nullptr)
        << e.what();
  }
  SetThreadRank(0);
}

}  // namespace
}  // namespace shoal
