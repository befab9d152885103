// Pairs of .bin and .idx, good and bad.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "data/indexed_file.h"
#include "data/loader.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;
using testing::ReadAll;
using testing::TempDir;

// An .idx spelled out byte by byte, so that each field can be wrong.
struct Idx {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 4;
  std::vector<int32_t> lengths;
  std::vector<int64_t> offsets, documents;
  uint64_t sequences = ~0ull, entries = ~0ull;  // ~0: as many as there are

  std::string Bytes() const {
    std::string out = magic;
    const auto put = [&](auto v) { out.append(reinterpret_cast<const char*>(&v), sizeof(v)); };
    put(version);
    put(code);
    put(sequences == ~0ull ? lengths.size() : sequences);
    put(entries == ~0ull ? documents.size() : entries);
    for (const auto v : lengths) put(v);
    for (const auto v : offsets) put(v);
    for (const auto v : documents) put(v);
    return out;
  }
};

template <class T>
std::string Raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// Two documents: sequences of 2 and 1 ids, then of 0 and 3.
Idx Good(int width = 4, uint8_t code = 4) {
  return {.code = code,
          .lengths = {2, 1, 0, 3},
          .offsets = {0, 2 * width, 3 * width, 3 * width},
          .documents = {0, 2, 4}};
}
const std::vector<int> kIds = {5, 6, 7, 8, 9, 100};

std::vector<int32_t> All(const TokenSource& source) {
  std::vector<int32_t> ids(source.size());
  source.Read(0, ids);
  return ids;
}

template <class T>
void CheckType(uint8_t code, const char* name) {
  TempDir dir;
  dir.Write("d.idx", Good(sizeof(T), code).Bytes());
  dir.Write("d.bin", Raw(std::vector<T>(kIds.begin(), kIds.end())));
  for (const std::string& path : {dir / "d", dir / "d.bin", dir / "d.idx"}) {
    const auto source = OpenCorpus({.path = path, .vocab = 101});
    EXPECT_EQ(All(*source), (std::vector<int32_t>(kIds.begin(), kIds.end())));
    EXPECT_EQ(source->info().dtype, name);
    EXPECT_EQ(source->info().format, "bin/idx");
    EXPECT_EQ(source->info().documents, 2);
    EXPECT_TRUE(source->has_documents());
    EXPECT_EQ(source->NextDocument(0, 6), 3);
    EXPECT_EQ(source->NextDocument(2, 6), 3);
    EXPECT_EQ(source->NextDocument(3, 6), 6);
    EXPECT_EQ(source->NextDocument(0, 2), 2);
  }
  ExpectDataError({"d.bin: token 5 has the id 100", "vocabulary of 100"},
                  [&] { OpenCorpus({.path = dir / "d", .vocab = 100}); });
}

TEST(Indexed, EveryIntegerType) {
  CheckType<uint8_t>(1, "u8");
  CheckType<int8_t>(2, "i8");
  CheckType<int16_t>(3, "i16");
  CheckType<int32_t>(4, "i32");
  CheckType<int64_t>(5, "i64");
  CheckType<uint16_t>(8, "u16");
}

TEST(Indexed, APrefixNeedNotBeAFileAndMayBeOne) {
  TempDir dir;
  dir.Write("d.idx", Good().Bytes());
  dir.Write("d.bin", Raw(kIds));
  dir.Write("d", "text of the same name");
  EXPECT_EQ(OpenCorpus({.path = dir / "d"})->info().format, "bin/idx");
}

TEST(Indexed, IdsOutsideTheVocabularyAreFoundWhereverTheyAre) {
  TempDir dir;
  const int64_t n = 200000;
  Idx idx{.lengths = {static_cast<int32_t>(n)}, .offsets = {0}, .documents = {0, 1}};
  const auto expect = [&](auto bad, int64_t position, int64_t vocab) {
    using T = decltype(bad);
    idx.code = sizeof(T) == 8 ? 5 : sizeof(T) == 4 ? 4 : sizeof(T) == 1 ? 2 : 3;
    dir.Write("d.idx", idx.Bytes());
    std::vector<T> ids(n, 1);
    ids[position] = bad;
    dir.Write("d.bin", Raw(ids));
    ExpectDataError({fmt::format("d.bin: token {} has the id {}, outside", position, bad)},
                    [&] { OpenCorpus({.path = dir / "d", .vocab = vocab}); });
  };
  for (const int64_t position : {int64_t{0}, int64_t{65535}, int64_t{65536}, n - 1}) {
    expect(int32_t{-1}, position, 50257);
    expect(int32_t{50257}, position, 50257);
    expect(std::numeric_limits<int32_t>::min(), position, 0);
    expect(int64_t{1} << 32, position, 0);  // would be 0 in 32 bits
    expect((int64_t{1} << 32) + 1, position, 50257);
    expect(std::numeric_limits<int64_t>::min(), position, 50257);
    expect(int16_t{-2}, position, 65536);
    expect(int8_t{-128}, position, 50257);
  }
}

// A start does not wait for terabytes; what is wrong in them is an error when it is reached.
TEST(Indexed, HugeFilesAreCheckedAsTheyAreRead) {
  TempDir dir;
  const int64_t sequences = 9, length = (int64_t{1} << 30) - 1, n = sequences * length;
  Idx idx{
      .code = 8, .lengths = std::vector<int32_t>(sequences, length), .documents = {0, sequences}};
  for (int64_t i = 0; i < sequences; ++i) idx.offsets.push_back(2 * i * length);
  dir.Write("d.idx", idx.Bytes());
  dir.Write("d.bin", "");
  std::error_code error;
  std::filesystem::resize_file(dir / "d.bin", 2 * n, error);  // takes no room: all is a hole
  if (error) GTEST_SKIP() << error.message();
  std::fstream(dir / "d.bin", std::ios::in | std::ios::out | std::ios::binary)
      .seekp(2 * (n - 2))
      .write("\xFF\xFF", 2);
  const auto source = OpenCorpus({.path = dir / "d", .vocab = 65535});
  EXPECT_EQ(source->size(), n);
  const Loader loader(source, {.sequence_length = 4, .validation_fraction = 1e-9});
  EXPECT_EQ(loader.train_sequences() + loader.validation_sequences(), (n - 1) / 4);
  EXPECT_EQ(loader.Train(1 << 20, 8, 0, 8).tokens, std::vector<int32_t>(32));
  std::vector<int32_t> ids(10);
  ExpectDataError({fmt::format("d.bin: token {} has the id 65535", n - 2)},
                  [&] { source->Read(n - 10, ids); });
}

TEST(Indexed, EachWrongFieldIsNamed) {
  TempDir dir;
  dir.Write("d.bin", Raw(kIds));
  const auto expect = [&](std::initializer_list<std::string> parts, const std::string& idx) {
    dir.Write("d.idx", idx);
    ExpectDataError(parts, [&] { OpenCorpus({.path = dir / "d"}); });
  };
  const auto with = [](auto change) {
    Idx idx = Good();
    change(idx);
    return idx.Bytes();
  };
  expect({"d.idx", "not an index"}, "");
  expect({"d.idx", "not an index"}, std::string(33, 'M'));
  expect({"d.idx", "not an index"}, with([](Idx& i) { i.magic[0] = 'X'; }));
  expect({"d.idx", "version 2"}, with([](Idx& i) { i.version = 2; }));
  expect({"type code 7 is a floating-point type"}, with([](Idx& i) { i.code = 7; }));
  expect({"type code 6 is a floating-point type"}, with([](Idx& i) { i.code = 6; }));
  expect({"type code 0 is unknown"}, with([](Idx& i) { i.code = 0; }));
  expect({"type code 9 is unknown"}, with([](Idx& i) { i.code = 9; }));
  expect({"which 5 sequences and 3 document entries do not fill"},
         with([](Idx& i) { i.sequences = 5; }));
  expect({"do not fill"}, with([](Idx& i) { i.entries = 4; }));
  // Counts whose product with the width is the right number again modulo 2^64.
  expect({"do not fill"}, with([](Idx& i) { i.entries = 3 + (1ull << 61); }));
  expect({"do not fill"}, with([](Idx& i) { i.sequences = 4 + (1ull << 62); }));
  expect({"do not fill"}, Good().Bytes() + "x");
  expect({"do not fill"}, Good().Bytes().substr(0, Good().Bytes().size() - 1));
  expect({"sequence 1 has the length -1"}, with([](Idx& i) { i.lengths[1] = -1; }));
  expect({"sequence 2 begins at byte 16", "end at 12"}, with([](Idx& i) { i.offsets[2] = 16; }));
  expect({"sequence 0 begins at byte -4"}, with([](Idx& i) { i.offsets[0] = -4; }));
  expect({"does not begin with sequence 0"}, with([](Idx& i) { i.documents[0] = 1; }));
  expect({"does not begin with sequence 0"}, with([](Idx& i) { i.documents.clear(); }));
  expect({"ends with sequence 3 of 4"}, with([](Idx& i) { i.documents[2] = 3; }));
  expect({"entry 1 of the document index is -1"}, with([](Idx& i) { i.documents[1] = -1; }));
  expect({"entry 2 of the document index is 4, less"}, with([](Idx& i) {
           i.documents = {0, 5, 4};
         }));
  expect({"d.bin has 24 bytes", "describes 7 ids of type i32, 28 bytes"},
         with([](Idx& i) { i.lengths[3] = 4; }));
  expect({"d.bin has 24 bytes", "describes 5 ids", "20 bytes"},
         with([](Idx& i) { i.lengths[3] = 2; }));
  dir.Write("d.idx", Good().Bytes());
  dir.Write("d.bin", Raw(kIds).substr(0, 23));
  ExpectDataError({"d.bin has 23 bytes"}, [&] { OpenCorpus({.path = dir / "d"}); });
  dir.Write("d.bin", "");
  dir.Write("d.idx", Idx{.documents = {0}}.Bytes());
  ExpectDataError({"d.bin is empty"}, [&] { OpenCorpus({.path = dir / "d"}); });
}

TEST(Indexed, AMissingHalfIsNamed) {
  TempDir dir;
  dir.Write("b.bin", Raw(kIds));
  ExpectDataError({"b.idx does not exist", "b.bin needs it"},
                  [&] { OpenCorpus({.path = dir / "b"}); });
  ExpectDataError({"b.idx does not exist"}, [&] { OpenCorpus({.path = dir / "b.bin"}); });
  dir.Write("i.idx", Good().Bytes());
  ExpectDataError({"i.bin does not exist", "i.idx needs it"},
                  [&] { OpenCorpus({.path = dir / "i"}); });
  ExpectDataError({"none.bin does not exist"}, [&] { OpenCorpus({.path = dir / "none.idx"}); });
}

TEST(Indexed, EveryFlippedBitIsAnErrorOrReadsInBounds) {
  TempDir dir;
  dir.Write("d.bin", Raw(kIds));
  const std::string good = Good().Bytes();
  int accepted = 0;
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bytes = good;
    bytes[bit / 8] ^= static_cast<char>(1 << bit % 8);
    dir.Write("d.idx", bytes);
    try {
      const auto source = OpenCorpus({.path = dir / "d"});
      ++accepted;
      EXPECT_EQ(All(*source).size(), static_cast<size_t>(source->size()));
      for (int64_t i = 0; i < source->size(); ++i) {
        const int64_t next = source->NextDocument(i, source->size());
        EXPECT_GT(next, i);
        EXPECT_LE(next, source->size());
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kData);
    }
  }
  // Only where a document begins, among the sequences, can be wrong unseen.
  EXPECT_LE(accepted, 3);
}

TEST(Indexed, DocumentsWithoutEndTokensAreKeptApart) {
  TempDir dir;
  dir.Write("d.idx", Good().Bytes());
  dir.Write("d.bin", Raw(kIds));
  const Loader loader(OpenCorpus({.path = dir / "d"}), {.sequence_length = 5, .documents = true});
  const Batch batch = loader.Train(0, 1, 0, 1);
  EXPECT_EQ(batch.documents, (std::vector<int32_t>{0, 0, 0, 1, 1}));
  EXPECT_EQ(batch.positions, (std::vector<int32_t>{0, 1, 2, 0, 1}));
  EXPECT_EQ(batch.labels, (std::vector<int32_t>{6, 7, -1, 9, 100}));
}

}  // namespace
}  // namespace shoal
