#include "checkpoint/part.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <utility>

#include "checkpoint/behind.h"
#include "core/base/error.h"

namespace shoal {
namespace {

// Whether one of `n` words has all bits of `exponent`: an infinite value or a NaN. Without a branch
// in the loop, so that it runs at memory speed.
template <class Word>
bool AnyFull(const char* data, int64_t bytes, Word exponent) {
  bool any = false;
  for (int64_t i = 0; i + static_cast<int64_t>(sizeof(Word)) <= bytes;
       i += static_cast<int64_t>(sizeof(Word))) {
    Word word;
    std::memcpy(&word, data + i, sizeof(Word));
    any |= (word & exponent) == exponent;
  }
  return any;
}

bool AnyNonFinite(DType dtype, const char* data, int64_t bytes) {
  switch (dtype) {
    case DType::kF64:
      return AnyFull<uint64_t>(data, bytes, 0x7ff0000000000000U);
    case DType::kF32:
      return AnyFull<uint32_t>(data, bytes, 0x7f800000U);
    case DType::kBF16:
      return AnyFull<uint16_t>(data, bytes, 0x7f80U);
    case DType::kF16:
      return AnyFull<uint16_t>(data, bytes, 0x7c00U);
    default:
      return false;
  }
}

}  // namespace

PartPlan PlanPart(int rank, const StateDict& state) {
  PartPlan plan;
  plan.file = fmt::format("rank-{:04}.h5", rank);
  for (const StateEntry& entry : state) {
    SHOAL_CHECK(entry.tensor.contiguous(), "checkpoint", "{} is not contiguous", entry.name);
    plan.pieces.push_back(PieceOf(entry));
    plan.arrays.push_back({entry.name, entry.tensor.dtype(), {plan.pieces.back().count}});
  }
  if (plan.arrays.empty()) return plan;
  plan.layout = LayOutHdf5(plan.arrays);
  std::map<int64_t, PartPlan::Stretch> by_place;
  std::vector<Extent> arrays;
  for (size_t i = 0; i < plan.arrays.size(); ++i) {
    const Extent extent = {plan.layout.offsets[i], plan.arrays[i].bytes()};
    if (extent.bytes > 0) by_place[extent.at] = {extent.bytes, static_cast<int>(i)};
    arrays.push_back(extent);
  }
  for (const Extent& gap : Gaps(std::move(arrays), plan.layout.size))
    by_place[gap.at] = {gap.bytes, -1};
  for (const auto& [at, stretch] : by_place) plan.stretches.push_back(stretch);
  return plan;
}

PartImage::PartImage(const PartPlan& plan, const StateDict& state) {
  SHOAL_CHECK(state.size() == plan.arrays.size(), "checkpoint", "{} tensors, {} were planned",
              state.size(), plan.arrays.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const Tensor& tensor = state[i].tensor;
    const Hdf5Array& array = plan.arrays[i];
    SHOAL_CHECK(state[i].name == array.name && tensor.dtype() == array.dtype &&
                    tensor.numel() == array.shape.numel() && tensor.contiguous(),
                "checkpoint", "{} is not as it was planned", state[i].name);
  }
  const char* frame = plan.layout.frame.data();
  for (const auto& [bytes, array] : plan.stretches) {
    const char* data = array < 0 ? std::exchange(frame, frame + bytes)
                                 : state[static_cast<size_t>(array)].tensor.view().as<const char>();
    sources_.emplace_back(data, bytes);
    left_ += bytes;
  }
}

int64_t PartImage::Next(char* to, int64_t bytes) {
  int64_t copied = 0;
  while (copied < bytes && source_ < sources_.size()) {
    const auto [data, size] = sources_[source_];
    const int64_t count = std::min(bytes - copied, size - done_);
    std::memcpy(to + copied, data + done_, static_cast<size_t>(count));
    copied += count;
    done_ += count;
    if (done_ < size) continue;
    done_ = 0;
    ++source_;
  }
  left_ -= copied;
  return copied;
}

PartFile::PartFile(const std::string& partial, const PartPlan& plan, const FullDisk& full_disk)
    : plan_(plan), full_disk_(full_disk) {
  for (size_t i = 0; i < plan.arrays.size(); ++i) {
    const Hdf5Array& array = plan.arrays[i];
    part_.tensors[array.name] = {array.dtype,
                                 plan.pieces[i].global,
                                 {{plan.pieces[i], plan.file, plan.layout.offsets[i], {}}}};
  }
  if (plan.arrays.empty()) return;
  std::error_code error;
  std::filesystem::create_directory(partial, error);
  if (error) FailFile(partial, "cannot be created: " + error.message());
  file_ = std::make_unique<File>(File::Create(partial + "/" + plan.file));
  file_->Reserve(plan.layout.size, full_disk_);
  part_.files[plan.file] = {plan.layout.size, Digest(plan.layout.frame)};
}

void PartFile::Append(const char* data, int64_t bytes) {
  // The disk works while digests are taken.
  std::future<void> write = Behind([&] { file_->WriteDirect(data, bytes, written_, full_disk_); });
  TakeDigests(data, bytes);
  write.get();
  written_ += bytes;
}

void PartFile::TakeDigests(const char* data, int64_t bytes) {
  while (bytes > 0) {
    SHOAL_CHECK(stretch_ < plan_.stretches.size(), "checkpoint", "{} bytes too many", bytes);
    const auto [size, array] = plan_.stretches[stretch_];
    // Up to the end of the array, and of the chunk.
    const int64_t chunk = array < 0 ? size : kChunkBytes - done_ % kChunkBytes;
    const int64_t count = std::min({bytes, size - done_, chunk});
    if (array >= 0) AddToArray(static_cast<size_t>(array), data, count);
    data += count;
    bytes -= count;
    done_ += count;
    if (done_ < size) continue;
    done_ = 0;
    ++stretch_;
  }
}

// What follows done_ bytes of it, of one chunk.
void PartFile::AddToArray(size_t array, const char* data, int64_t bytes) {
  const auto& [name, dtype, shape] = plan_.arrays[array];
  digest_.Add(data, bytes);
  if (non_finite_.empty() && !Finite(dtype, data, bytes)) non_finite_ = name;
  const int64_t end = done_ + bytes;
  if (end == plan_.arrays[array].bytes() || end % kChunkBytes == 0)
    part_.tensors[name].pieces[0].digests.push_back(digest_.Take());
}

bool PartFile::Finite(DType dtype, const char* data, int64_t bytes) {
  const auto size = static_cast<int64_t>(SizeOf(dtype));
  const int64_t before = done_ % size;
  bool finite = true;
  if (before > 0) {
    const int64_t count = std::min(size - before, bytes);
    std::memcpy(element_ + before, data, static_cast<size_t>(count));
    if (before + count == size) finite = !AnyNonFinite(dtype, element_, size);
    data += count;
    bytes -= count;
  }
  const int64_t whole = bytes / size * size;
  if (bytes > whole) std::memcpy(element_, data + whole, static_cast<size_t>(bytes - whole));
  return finite && !AnyNonFinite(dtype, data, whole);
}

std::string PartFile::Finish() {
  SHOAL_CHECK(written_ == plan_.layout.size, "checkpoint", "{} of {} bytes were written", written_,
              plan_.layout.size);
  if (file_ != nullptr) file_->Flush();
  return PartToText(part_);
}

}  // namespace shoal
