#include "data/array_source.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/base/error.h"

namespace shoal {
namespace {

template <class F>
decltype(auto) VisitInt(IntType type, F&& f) {
  switch (type) {
    case IntType::kU8:
      return f(uint8_t{});
    case IntType::kI8:
      return f(int8_t{});
    case IntType::kU16:
      return f(uint16_t{});
    case IntType::kI16:
      return f(int16_t{});
    case IntType::kU32:
      return f(uint32_t{});
    case IntType::kI32:
      return f(int32_t{});
    case IntType::kU64:
      return f(uint64_t{});
    case IntType::kI64:
      break;
  }
  return f(int64_t{});
}

template <class T>
T Load(const char* data, int64_t i) {
  T value;
  std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// One unsigned comparison is both bounds: a negative id is a huge unsigned one.
template <class T>
bool Outside(T value, uint64_t limit) {
  return static_cast<uint64_t>(static_cast<int64_t>(value)) >= limit;
}

}  // namespace

void FailBadId(const std::string& path, int64_t position, const std::string& id, int64_t vocab) {
  SHOAL_FAIL(ErrorKind::kData, "data",
             "{}: token {} has the id {}, outside the vocabulary of {} (ids 0 to {}). {}", path,
             position, id, vocab, vocab - 1,
             id.starts_with('-')
                 ? "No tokenizer makes such an id: the file is damaged or holds something else"
                 : "Set model.vocab to more than the largest id, or tokenize again with the "
                   "model's own tokenizer");
}

ArraySource::ArraySource(SourceInfo info, TokenArray array, int64_t vocab,
                         NextDocumentFunction next_document)
    : array_(std::move(array)),
      limit_(vocab > 0 ? vocab : int64_t{std::numeric_limits<int32_t>::max()} + 1),
      next_document_(std::move(next_document)) {
  info_ = std::move(info);
  CheckAllIds();
}

void ArraySource::CheckAllIds() const {
  if (array_.size * SizeOf(array_.type) > kCheckedAtOpening) return;
  VisitInt(array_.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_unsigned_v<T>)
      if (std::numeric_limits<T>::max() < static_cast<uint64_t>(limit_)) return;
    // Blocks, so that the loop without a branch runs over what the cache holds.
    constexpr int64_t kBlock = 1 << 16;
    for (int64_t begin = 0; begin < array_.size; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, array_.size);
      T low = 0, high = 0;
      for (int64_t i = begin; i < end; ++i) {
        const T value = Load<T>(array_.data, i);
        low = std::min(low, value);
        high = std::max(high, value);
      }
      if (Outside(low, limit_) || Outside(high, limit_)) FailAtFirstBadId(begin, end - begin);
    }
  });
}

void ArraySource::FailAtFirstBadId(int64_t begin, int64_t count) const {
  VisitInt(array_.type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < begin + count; ++i) {
      const T value = Load<T>(array_.data, i);
      if (Outside(value, limit_)) FailBadId(info_.path, i, fmt::format("{}", value), limit_);
    }
  });
  SHOAL_FAIL(ErrorKind::kData, "data", "{} changed while it was being read", info_.path);
}

void ArraySource::Read(int64_t begin, std::span<int32_t> out) const {
  const int64_t count = static_cast<int64_t>(out.size());
  SHOAL_CHECK(begin >= 0 && begin + count <= array_.size, "data",
              "tokens {} to {} of a corpus of {}", begin, begin + count, array_.size);
  bool outside = false;
  VisitInt(array_.type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < count; ++i) {
      const T value = Load<T>(array_.data, begin + i);
      outside |= Outside(value, limit_);
      out[i] = static_cast<int32_t>(value);
    }
  });
  // The check at opening saw none: a mapped file was changed since.
  if (outside) [[unlikely]]
    FailAtFirstBadId(begin, count);
}

bool ArraySource::has_documents() const {
  return next_document_ || info_.end_of_document.has_value();
}

int64_t ArraySource::NextDocument(int64_t position, int64_t limit) const {
  if (next_document_) return std::min(next_document_(position), limit);
  SHOAL_CHECK(has_documents(), "data", "{} does not say where documents begin", info_.path);
  return VisitInt(array_.type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = std::max<int64_t>(position, 0); i + 1 < limit; ++i)
      if (static_cast<int64_t>(Load<T>(array_.data, i)) == *info_.end_of_document) return i + 1;
    return limit;
  });
}

PackedTokens::PackedTokens(int64_t vocab) : type_(TypeForVocab(vocab)) {}

void PackedTokens::Add(std::span<const int32_t> ids) {
  AppendAs(type_, ids, bytes_);
  size_ += static_cast<int64_t>(ids.size());
}

TokenArray PackedTokens::Finish() && {
  auto owner = std::make_shared<const std::vector<char>>(std::move(bytes_));
  return {type_, owner->data(), size_, owner};
}

void AppendAs(IntType type, std::span<const int32_t> ids, std::vector<char>& bytes) {
  VisitInt(type, [&](auto zero) {
    using T = decltype(zero);
    const size_t begin = bytes.size();
    bytes.resize(begin + ids.size() * sizeof(T));
    for (size_t i = 0; i < ids.size(); ++i) {
      const T value = static_cast<T>(ids[i]);
      SHOAL_CHECK(static_cast<int64_t>(value) == ids[i], "data", "the id {} does not fit {}",
                  ids[i], Name(type));
      std::memcpy(bytes.data() + begin + i * sizeof(T), &value, sizeof(T));
    }
  });
}

int64_t NextStart(std::span<const int64_t> starts, int64_t position) {
  const auto next = std::upper_bound(starts.begin(), starts.end(), position);
  return next == starts.end() ? std::numeric_limits<int64_t>::max() : *next;
}

}  // namespace shoal
