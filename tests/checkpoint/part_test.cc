#include "checkpoint/part.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "checkpoint/store.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

// Of all widths and odd lengths, so that arrays begin anywhere; one is as large as several pages.
StateDict Odd() {
  StateDict state;
  int64_t i = 0;
  for (const DType dtype : {DType::kBF16, DType::kF64, DType::kU8, DType::kF32, DType::kBF16}) {
    for (const int64_t n : {3, 0, 1, 5000}) {
      const std::string name = fmt::format("model/{}", i++);
      state.push_back({name, Tensor::Full({n}, dtype, 1), Dims{n}, Dims{0}});
    }
  }
  return state;
}

struct Written {
  std::string bytes, part, non_finite;
};

// The file, put together of pieces of the given sizes in turn.
Written Write(const std::string& directory, const StateDict& state, std::vector<int64_t> pieces) {
  const PartPlan plan = PlanPart(0, state);
  BeginSave(directory, 1);
  Written written;
  {
    PartFile file(PartialSave(directory, 1), plan, {});
    PartImage image(plan, state);
    auto* memory = static_cast<char*>(std::aligned_alloc(kDirectBytes, 1 << 20));
    for (size_t i = 0; image.left() > 0; ++i)
      file.Append(memory, image.Next(memory, pieces[i % pieces.size()]));
    std::free(memory);
    written.part = file.Finish();
    written.non_finite = file.non_finite();
  }
  written.bytes = ReadText(PartialSave(directory, 1) + "/" + plan.file);
  return written;
}

TEST(PartFile, IsTheSameInAnyPieces) {
  const TemporaryDirectory directory;
  const StateDict state = Odd();
  const PartPlan plan = PlanPart(0, state);
  const Written whole = Write(directory.path(), state, {1 << 20});
  ASSERT_EQ(std::ssize(whole.bytes), plan.layout.size);
  for (size_t i = 0; i < state.size(); ++i)
    EXPECT_EQ(
        whole.bytes.compare(static_cast<size_t>(plan.layout.offsets[i]), state[i].tensor.bytes(),
                            {state[i].tensor.view().as<const char>(), state[i].tensor.bytes()}),
        0)
        << state[i].name;
  // Pages go to the disk directly, the rest through the cache, and then pages again.
  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{4096}, {8192, 1, 4095}, {1021}, {64, 4096, 32768}}) {
    const Written cut = Write(directory.path(), state, pieces);
    EXPECT_EQ(cut.bytes, whole.bytes) << pieces[0];
    EXPECT_EQ(cut.part, whole.part) << pieces[0];
    EXPECT_EQ(cut.non_finite, "");
  }
}

// Also where its bytes come in two pieces.
TEST(PartFile, AValueThatIsNotFiniteIsNamed) {
  const TemporaryDirectory directory;
  for (const double bad : {double{NAN}, -double{INFINITY}}) {
    for (size_t i = 0; i < Odd().size(); ++i) {
      const StateDict state = Odd();
      const Tensor& t = state[i].tensor;
      if (!IsFloat(t.dtype()) || t.numel() == 0) continue;
      t.Narrowed(0, t.numel() / 2, 1).Fill(bad);
      for (const int64_t piece : {1 << 20, 1021, 4095})
        EXPECT_EQ(Write(directory.path(), state, {piece}).non_finite, state[i].name) << piece;
    }
  }
}

TEST(PartFile, AStateThatWasNotPlannedIsRefused) {
  StateDict state = Odd();
  const PartPlan plan = PlanPart(0, state);
  state[0].name = "model/other";
  EXPECT_THROW(PartImage(plan, state), Error);
  state.pop_back();
  EXPECT_THROW(PartImage(plan, state), Error);
}

}  // namespace
}  // namespace shoal
