#include "data/indexed_file.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <limits>

#include "core/base/error.h"
#include "data/file.h"

namespace shoal {
namespace {

// The layout of an .idx, all numbers little-endian and without padding:
//   char[9] magic, u64 version, u8 type, u64 sequences S, u64 entries D of the document index,
//   i32[S] lengths in ids, i64[S] byte offsets into the .bin, i64[D] first sequence of each
//   document and at last S.
constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr uint64_t kVersion1 = 1;
constexpr int64_t kHeader = 34;
static_assert(std::endian::native == std::endian::little, "files of ids are little-endian");

constexpr IntType kTypes[] = {IntType::kU8,  IntType::kI8,  IntType::kI16,
                              IntType::kI32, IntType::kI64, IntType::kU16};
constexpr uint8_t kCodes[] = {1, 2, 3, 4, 5, 8};  // of kTypes; 6 is f64, 7 is f32

template <class T>
T Get(const char* data, int64_t i = 0) {
  T value;
  std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

struct Index {
  FileBytes file;
  IntType type = IntType::kI32;
  int64_t sequences = 0, entries = 0;
  const char *lengths = nullptr, *offsets = nullptr, *documents = nullptr;

  // The first token of document `i` in the index.
  int64_t DocumentStart(int64_t i, int64_t tokens) const {
    const int64_t sequence = Get<int64_t>(documents, i);
    return sequence == sequences ? tokens : Get<int64_t>(offsets, sequence) / SizeOf(type);
  }
};

template <class... Args>
[[noreturn]] void FailIndex(const std::string& path, fmt::format_string<Args...> what,
                            Args&&... args) {
  SHOAL_FAIL(ErrorKind::kData, "bin/idx", "{}: {}. Build the pair again with its maker", path,
             fmt::format(what, std::forward<Args>(args)...));
}

Index ReadHeader(const std::string& path) {
  Index index{.file = FileBytes(path)};
  const char* p = index.file.data();
  const int64_t size = index.file.size();
  if (size < kHeader || std::memcmp(p, kMagic, sizeof(kMagic)) != 0)
    FailIndex(path,
              "not an index of ids: it does not begin with MMIDIDX and a header of 34 "
              "bytes");
  const uint64_t version = Get<uint64_t>(p + 9);
  if (version != kVersion1) FailIndex(path, "version {}, where 1 is known", version);
  const uint8_t code = Get<uint8_t>(p + 17);
  const auto* known = std::find(std::begin(kCodes), std::end(kCodes), code);
  if (known == std::end(kCodes))
    FailIndex(path, "type code {} {}", code,
              code == 6 || code == 7 ? "is a floating-point type, which no ids have"
                                     : "is unknown (1-5 and 8 are integers)");
  index.type = kTypes[known - std::begin(kCodes)];
  const uint64_t sequences = Get<uint64_t>(p + 18), entries = Get<uint64_t>(p + 26);
  // First each alone, so that the sum below cannot overflow.
  const uint64_t bytes = static_cast<uint64_t>(size);
  if (sequences > bytes / 12 || entries > bytes / 8 ||
      kHeader + sequences * 12 + entries * 8 != bytes)
    FailIndex(path, "{} bytes, which {} sequences and {} document entries do not fill", size,
              sequences, entries);
  index.sequences = static_cast<int64_t>(sequences);
  index.entries = static_cast<int64_t>(entries);
  index.lengths = p + kHeader;
  index.offsets = index.lengths + 4 * index.sequences;
  index.documents = index.offsets + 8 * index.sequences;
  return index;
}

// Returns the number of tokens that the index describes.
int64_t CheckSequences(const Index& index, const std::string& path) {
  const int64_t width = SizeOf(index.type);
  int64_t bytes = 0;
  for (int64_t i = 0; i < index.sequences; ++i) {
    const int64_t length = Get<int32_t>(index.lengths, i), offset = Get<int64_t>(index.offsets, i);
    if (length < 0) FailIndex(path, "sequence {} has the length {}", i, length);
    if (offset != bytes)
      FailIndex(path,
                "sequence {} begins at byte {} of the .bin, where the sequences before it "
                "end at {}",
                i, offset, bytes);
    if (__builtin_add_overflow(bytes, length * width, &bytes))
      FailIndex(path, "the lengths up to sequence {} overflow", i);
  }
  return bytes / width;
}

void CheckDocuments(const Index& index, const std::string& path) {
  if (index.entries < 1 || Get<int64_t>(index.documents, 0) != 0)
    FailIndex(path, "the document index does not begin with sequence 0");
  for (int64_t i = 1; i < index.entries; ++i)
    if (Get<int64_t>(index.documents, i) < Get<int64_t>(index.documents, i - 1))
      FailIndex(path, "entry {} of the document index is {}, less than the one before", i,
                Get<int64_t>(index.documents, i));
  const int64_t last = Get<int64_t>(index.documents, index.entries - 1);
  if (last != index.sequences)
    FailIndex(path, "the document index ends with sequence {} of {}", last, index.sequences);
}

}  // namespace

std::shared_ptr<const TokenSource> OpenIndexed(const CorpusOptions& options) {
  const std::string bin_path = options.path + ".bin", idx_path = options.path + ".idx";
  for (const auto& [path, other] : {std::pair{bin_path, idx_path}, std::pair{idx_path, bin_path}}) {
    std::error_code error;
    if (!std::filesystem::exists(path, error))
      SHOAL_FAIL(ErrorKind::kData, "bin/idx",
                 "{} does not exist; {} needs it beside it (data.path is their common prefix)",
                 path, other);
  }
  auto index = std::make_shared<Index>(ReadHeader(idx_path));
  const int64_t tokens = CheckSequences(*index, idx_path);
  CheckDocuments(*index, idx_path);
  const FileBytes bin(bin_path);
  if (bin.size() != tokens * SizeOf(index->type))
    SHOAL_FAIL(
        ErrorKind::kData, "bin/idx",
        "{} has {} bytes, but its index describes {} ids of type {}, {} bytes. One of the two "
        "is cut short or belongs to another",
        bin_path, bin.size(), tokens, Name(index->type), tokens * SizeOf(index->type));
  if (tokens == 0)
    SHOAL_FAIL(ErrorKind::kData, "bin/idx", "{} is empty: there are no ids to learn from",
               bin_path);

  SourceInfo info{.path = bin_path, .format = "bin/idx", .dtype = Name(index->type)};
  info.stored_bytes = bin.size() + index->file.size();
  info.documents = index->entries - 1;
  info.end_of_document = options.end_of_document;
  return std::make_shared<ArraySource>(
      std::move(info), TokenArray{index->type, bin.data(), tokens, bin.owner()}, options.vocab,
      [index, tokens](int64_t position) {
        int64_t low = 0, high = index->entries;  // the first entry whose token is after position
        while (low < high) {
          const int64_t middle = low + (high - low) / 2;
          if (index->DocumentStart(middle, tokens) > position)
            high = middle;
          else
            low = middle + 1;
        }
        const int64_t start = low < index->entries ? index->DocumentStart(low, tokens) : tokens;
        return start < tokens ? start : std::numeric_limits<int64_t>::max();
      });
}

void WriteIndex(IntType type, std::span<const int64_t> starts, int64_t tokens, AtomicFile& file) {
  const auto* known = std::find(std::begin(kTypes), std::end(kTypes), type);
  SHOAL_CHECK(known != std::end(kTypes), "bin/idx", "no code for {}", Name(type));
  const uint64_t sequences = starts.size(), entries = starts.size() + 1;
  const auto put = [&](auto value) { file.Write(&value, sizeof(value)); };
  file.Write(kMagic, sizeof(kMagic));
  put(kVersion1);
  put(kCodes[known - std::begin(kTypes)]);
  put(sequences);
  put(entries);
  for (size_t i = 0; i < starts.size(); ++i) {
    const int64_t length = (i + 1 < starts.size() ? starts[i + 1] : tokens) - starts[i];
    if (length > std::numeric_limits<int32_t>::max())
      SHOAL_FAIL(
          ErrorKind::kData, "bin/idx",
          "document {} has {} ids, more than the 2^31 - 1 that a .idx can hold. Cut the text "
          "into several files, or write .h5",
          i, length);
    put(static_cast<int32_t>(length));
  }
  for (const int64_t start : starts) put(start * SizeOf(type));
  for (uint64_t i = 0; i < entries; ++i) put(static_cast<int64_t>(i));
}

}  // namespace shoal
