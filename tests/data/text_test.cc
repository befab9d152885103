// Text files as a corpus, and what is refused as text.
#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>

#include "data/token_source.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;
using testing::TempDir;

const ByteTokenizer kBytes;

std::shared_ptr<const TokenSource> Open(const std::string& path, int64_t vocab = 257,
                                        bool binary = false) {
  return OpenCorpus({.path = path, .tokenizer = &kBytes, .vocab = vocab, .binary = binary});
}

std::vector<int32_t> All(const TokenSource& source) {
  std::vector<int32_t> ids(source.size());
  source.Read(0, ids);
  return ids;
}

TEST(Text, AFileIsItsBytesAndADocumentEnd) {
  TempDir dir;
  const auto source = Open(dir.Write("a.txt", "Hi\n"));
  EXPECT_EQ(All(*source), (std::vector<int32_t>{'H', 'i', '\n', 256}));
  EXPECT_EQ(source->info().format, "text");
  EXPECT_EQ(source->info().documents, 1);
  EXPECT_EQ(source->info().stored_bytes, 3);
  EXPECT_TRUE(source->has_documents());
}

TEST(Text, ADirectoryIsItsFilesSortedByPath) {
  TempDir dir;
  dir.Write("c.txt", "c");
  dir.Write("a/z.txt", "z");
  dir.Write("a/b/y.md", "y");
  dir.Write("empty.txt", "");
  dir.Write(".git/config", "hidden");
  dir.Write("b/.hidden", "hidden");
  const auto source = Open(dir.path());
  EXPECT_EQ(All(*source), (std::vector<int32_t>{'y', 256, 'z', 256, 'c', 256}));
  EXPECT_EQ(source->info().documents, 3);
  EXPECT_EQ(source->NextDocument(0, 100), 2);
  EXPECT_EQ(source->NextDocument(1, 100), 2);
  EXPECT_EQ(source->NextDocument(2, 100), 4);
  EXPECT_EQ(source->NextDocument(2, 3), 3);
  EXPECT_EQ(source->NextDocument(4, 100), 100);
}

TEST(Text, AnyWindowReadsTheSameTokens) {
  TempDir dir;
  for (int i = 0; i < 7; ++i) dir.Write(std::to_string(i), std::string(i * i + 1, 'a' + i));
  const auto source = Open(dir.path());
  const std::vector<int32_t> all = All(*source);
  for (int64_t begin = 0; begin <= source->size(); ++begin) {
    for (int64_t end = begin; end <= source->size(); ++end) {
      std::vector<int32_t> part(end - begin);
      source->Read(begin, part);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), all.begin() + begin));
    }
  }
  std::vector<int32_t> one(1);
  EXPECT_THROW(source->Read(source->size(), one), Error);
  EXPECT_THROW(source->Read(-1, one), Error);
}

TEST(Text, LargeFilesAreMappedAndReadTheSame) {
  TempDir dir;
  std::string text(65 << 20, 'x');
  text[0] = 'a';
  text.back() = 'z';
  const auto source = Open(dir.Write("large.txt", text));
  std::vector<int32_t> ids(2);
  source->Read(0, ids);
  EXPECT_EQ(ids[0], 'a');
  source->Read(source->size() - 2, ids);
  EXPECT_EQ(ids, (std::vector<int32_t>{'z', 256}));
}

TEST(Text, WhatIsNotThereIsNamed) {
  TempDir dir;
  ExpectDataError({"none.txt", "does not exist"}, [&] { Open(dir / "none.txt"); });
  ExpectDataError({"empty.txt is empty"}, [&] { Open(dir.Write("empty.txt", "")); });
  std::filesystem::create_directory(dir / "void");
  ExpectDataError({"void holds no text"}, [&] { Open(dir / "void"); });
  dir.Write("hidden/.x", "x");
  dir.Write("hidden/empty", "");
  ExpectDataError({"hidden holds no text"}, [&] { Open(dir / "hidden"); });
  ExpectDataError({"/dev/null", "not a regular file"}, [&] { Open("/dev/null"); });
  if (geteuid() != 0) {
    const std::string path = dir.Write("secret.txt", "x");
    std::filesystem::permissions(path, std::filesystem::perms::none);
    ExpectDataError({"secret.txt", "Permission denied"}, [&] { Open(path); });
  }
}

TEST(Text, BinaryGarbageIsRefusedAtItsFirstByte) {
  TempDir dir;
  const std::string nul = dir.Write("nul.txt", std::string("abc\0def", 7));
  ExpectDataError({"nul.txt", "byte 3 is NUL", "data.binary = true"}, [&] { Open(nul); });
  std::string noise = "text";
  for (int i = 0; i < 4000; ++i) noise += static_cast<char>(1 + (i * 7919 >> 3) % 255);
  const std::string path = dir.Write("noise.txt", noise);
  ExpectDataError({"noise.txt is not text", "bytes are not UTF-8, the first at byte"},
                  [&] { Open(path); });
  EXPECT_EQ(Open(path, 257, true)->size(), 4005);
  EXPECT_EQ(Open(nul, 257, true)->size(), 8);
  dir.Write("mixed/a.txt", "good text");
  dir.Write("mixed/b.bin", std::string("\0\1", 2));
  ExpectDataError({"mixed/b.bin", "byte 0 is NUL"}, [&] { Open(dir / "mixed"); });
}

TEST(Text, Utf8IsJudgedByTheStandard) {
  TempDir dir;
  // Each of these is one or more bytes that are not UTF-8; alone they are more than a tenth.
  for (const std::string bad : {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF",
                                "\xED\xA0\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                                "\xF5\x80\x80\x80", "\xFF", "\xC3", "\xE6\xB0", "\xF0\x9F\x90"}) {
    ExpectDataError({"the first at byte 2"}, [&] { Open(dir.Write("bad.txt", "ab" + bad)); });
  }
  for (const std::string good : {"\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF",
                                 "\xEE\x80\x80", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    std::string text;
    for (int i = 0; i < 19; ++i) text += good;
    EXPECT_EQ(Open(dir.Write("good.txt", text))->size(), static_cast<int64_t>(text.size()) + 1);
  }
  // A stray byte in a long text is kept as it is: Latin-1 names in an English text.
  EXPECT_EQ(Open(dir.Write("latin.txt", "caf\xE9 and more than enough words around it"))->size(),
            42);
}

TEST(Text, AVocabularyTooSmallNamesFilePositionAndId) {
  TempDir dir;
  dir.Write("t/a", "ab");
  dir.Write("t/b", "abz");
  ExpectDataError({"t/b: token 2 has the id 122", "vocabulary of 122"}, [&] {
    // 'z' is 122; the document end of the first file comes before it.
    dir.Write("t/a", "");
    Open(dir / "t", 122);
  });
  ExpectDataError({"t/b: token 3 has the id 256", "vocabulary of 256 (ids 0 to 255)"},
                  [&] { Open(dir / "t", 256); });
  EXPECT_EQ(Open(dir / "t", 50257)->size(), 4);
}

TEST(Text, SentencePieceIdsReachTheCorpus) {
  TempDir dir;
  std::string text;
  for (int i = 0; i < 200; ++i) text += "walking by the river " + std::to_string(i) + "\n";
  dir.Write("t/a.txt", text);
  dir.Write("t/b.txt", "the river");
  const auto tokenizer = MakeTokenizer(
      TrainSentencePiece({.input = dir / "t", .vocab_size = 300, .output_prefix = dir / "m"}));
  const auto source = OpenCorpus({.path = dir / "t", .tokenizer = tokenizer.get(), .vocab = 300});
  const std::vector<int32_t> ids = All(*source);
  const std::vector<int32_t> first = tokenizer->Encode(text), last = tokenizer->Encode("the river");
  ASSERT_EQ(ids.size(), first.size() + last.size() + 2);
  EXPECT_TRUE(std::equal(first.begin(), first.end(), ids.begin()));
  EXPECT_EQ(ids[first.size()], tokenizer->end_of_document());
  EXPECT_EQ(ids.back(), tokenizer->end_of_document());
  EXPECT_EQ(source->NextDocument(0, source->size()), static_cast<int64_t>(first.size()) + 1);
  ExpectDataError({"outside the vocabulary of 299"}, [&] {
    OpenCorpus({.path = dir / "t", .tokenizer = tokenizer.get(), .vocab = 299});
  });
}

TEST(Text, FingerprintFollowsTheTokens) {
  TempDir dir;
  const std::string a = Fingerprint(*Open(dir.Write("a", "some text")));
  EXPECT_EQ(a.size(), 32u);
  EXPECT_EQ(a, Fingerprint(*Open(dir.Write("b", "some text"))));
  EXPECT_NE(a, Fingerprint(*Open(dir.Write("c", "some texts"))));
  EXPECT_NE(a, Fingerprint(*Open(dir.Write("d", "some tExt"))));
  // Large corpora are sampled: both ends are always seen.
  std::string text((1 << 24) + 100000, 'x');
  const std::string large = Fingerprint(*Open(dir.Write("l", text)));
  text[0] = 'y';
  EXPECT_NE(large, Fingerprint(*Open(dir.Write("l", text))));
  text[0] = 'x';
  text.back() = 'y';
  EXPECT_NE(large, Fingerprint(*Open(dir.Write("l", text))));
  text.back() = 'x';
  EXPECT_EQ(large, Fingerprint(*Open(dir.Write("l", text))));
}

// The quickstart's text, where its package is installed.
TEST(Text, KingJamesLoads) {
  TempDir dir;
  const std::string command = "bible -f gen1:1-rev22:21 > " + (dir / "kjv.txt") + " 2>/dev/null";
  if (std::system(command.c_str()) != 0) GTEST_SKIP() << "bible-kjv is not installed";
  const auto source = Open(dir / "kjv.txt");
  EXPECT_EQ(source->size(), 4404413);
  std::vector<int32_t> ids(20);
  source->Read(6, ids);
  EXPECT_EQ(kBytes.Decode(ids), "In the beginning God");
}

}  // namespace
}  // namespace shoal
