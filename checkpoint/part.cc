#include "checkpoint/part.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

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
    plan.data_bytes += plan.arrays.back().bytes();
  }
  if (!plan.arrays.empty()) plan.layout = LayOutHdf5(plan.arrays);
  return plan;
}

PartFile::PartFile(const std::string& partial, const PartPlan& plan, const FullDisk& full_disk)
    : plan_(plan), full_disk_(full_disk) {
  if (plan.arrays.empty()) return;
  std::error_code error;
  std::filesystem::create_directory(partial, error);
  if (error) FailFile(partial, "cannot be created: " + error.message());
  file_ = std::make_unique<File>(File::Create(partial + "/" + plan.file));
  file_->Reserve(plan.layout.size, full_disk_);
  std::vector<Extent> arrays;
  for (size_t i = 0; i < plan.arrays.size(); ++i)
    arrays.push_back({plan.layout.offsets[i], plan.arrays[i].bytes()});
  const char* frame = plan.layout.frame.data();
  for (const Extent& gap : Gaps(std::move(arrays), plan.layout.size)) {
    file_->Write(frame, gap.bytes, gap.at, full_disk_);
    frame += gap.bytes;
  }
  part_.files[plan.file] = {plan.layout.size, Digest(plan.layout.frame)};
}

void PartFile::Append(const void* data, int64_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    PassEmpty();
    SHOAL_CHECK(array_ < plan_.arrays.size(), "checkpoint", "{} bytes belong to no array", bytes);
    // Up to the end of the array, and of the chunk.
    const int64_t count =
        std::min({bytes, plan_.arrays[array_].bytes() - done_, kChunkBytes - done_ % kChunkBytes});
    AppendToArray(next, count);
    next += count;
    bytes -= count;
  }
}

void PartFile::AppendToArray(const char* data, int64_t bytes) {
  const Hdf5Array& array = plan_.arrays[array_];
  const int64_t at = plan_.layout.offsets[array_] + done_;
  file_->Write(data, bytes, at, full_disk_);
  // The disk works while digests are taken, and not only at the end.
  if (bytes > 0) file_->BeginFlush(at, bytes);
  digest_.Add(data, bytes);
  if (non_finite_.empty() && AnyNonFinite(array.dtype, data, bytes)) non_finite_ = array.name;
  done_ += bytes;
  const bool ends = done_ == array.bytes();
  if (!ends && done_ % kChunkBytes != 0) return;
  if (bytes > 0) digests_.push_back(digest_.Take());
  if (!ends) return;
  part_.tensors[array.name] = {array.dtype, plan_.pieces[array_].global, {}};
  part_.tensors[array.name].pieces.push_back(
      {plan_.pieces[array_], plan_.file, plan_.layout.offsets[array_], std::move(digests_)});
  digests_.clear();
  done_ = 0;
  ++array_;
}

void PartFile::PassEmpty() {
  while (array_ < plan_.arrays.size() && plan_.arrays[array_].bytes() == 0)
    AppendToArray(nullptr, 0);
}

std::string PartFile::Finish() {
  PassEmpty();
  if (file_ != nullptr) file_->Flush();
  SHOAL_CHECK(array_ == plan_.arrays.size(), "checkpoint", "{} of {} arrays were written", array_,
              plan_.arrays.size());
  return PartToText(part_);
}

}  // namespace shoal
