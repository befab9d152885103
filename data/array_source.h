// Token ids in an array of integers of any width, in memory or mapped from a file.
#pragma once

#include <functional>

#include "data/token_source.h"

namespace shoal {

enum class IntType : uint8_t { kU8, kI8, kU16, kI16, kU32, kI32, kU64, kI64 };

constexpr const char* Name(IntType type) {
  constexpr const char* kNames[] = {"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"};
  return kNames[static_cast<int>(type)];
}
constexpr int64_t SizeOf(IntType type) { return int64_t{1} << (static_cast<int>(type) / 2); }
// The narrowest type of ours that holds the ids of a vocabulary.
constexpr IntType TypeForVocab(int64_t vocab) {
  return vocab <= 65536 ? IntType::kU16 : IntType::kI32;
}

struct TokenArray {
  IntType type = IntType::kI32;
  const char* data = nullptr;  // any alignment
  int64_t size = 0;            // ids
  std::shared_ptr<const void> owner;
};

// The first document start after a position, INT64_MAX if there is none.
using NextDocumentFunction = std::function<int64_t(int64_t position)>;

class ArraySource final : public TokenSource {
 public:
  // Larger arrays would hold up the start of every rank; their ids are checked as they are read.
  static constexpr int64_t kCheckedAtOpening = int64_t{16} << 30;

  // `next_document` may be empty: then documents are known by info.end_of_document, if that is.
  // Checks every id of up to kCheckedAtOpening bytes.
  ArraySource(SourceInfo info, TokenArray array, int64_t vocab, NextDocumentFunction next_document);

  int64_t size() const override { return array_.size; }
  void Read(int64_t begin, std::span<int32_t> out) const override;
  bool has_documents() const override;
  int64_t NextDocument(int64_t position, int64_t limit) const override;

 private:
  [[noreturn]] void FailAtFirstBadId(int64_t begin, int64_t count) const;
  void CheckAllIds() const;

  TokenArray array_;
  int64_t limit_;  // ids are in [0, limit_)
  NextDocumentFunction next_document_;
};

// Collects ids as the narrowest type for `vocab`.
class PackedTokens {
 public:
  explicit PackedTokens(int64_t vocab);
  void Add(std::span<const int32_t> ids);
  int64_t size() const { return size_; }
  TokenArray Finish() &&;

 private:
  IntType type_;
  std::vector<char> bytes_;
  int64_t size_ = 0;
};

// `ids` as little-endian `type` at the end of `bytes`; every id must fit.
void AppendAs(IntType type, std::span<const int32_t> ids, std::vector<char>& bytes);

// The first of the ascending `starts` after `position`, INT64_MAX if there is none.
int64_t NextStart(std::span<const int64_t> starts, int64_t position);

// Throws the error for an id that a model with `vocab` ids cannot take.
[[noreturn]] void FailBadId(const std::string& path, int64_t position, const std::string& id,
                            int64_t vocab);

}  // namespace shoal
