#include "data/tokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <numeric>

#include "core/base/thread_count.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;
using testing::ReadAll;
using testing::TempDir;

// Prose with enough different words for a few hundred pieces, the same every time.
std::string Prose(int lines) {
  const char* const kWords[] = {"river", "stone", "walking", "the",   "of",    "and",
                                "light", "a",     "house",   "seven", "spoke", "people",
                                "unto",  "went",  "came",    "sea",   "king",  "daughter"};
  std::string text;
  uint32_t state = 1;
  for (int i = 0; i < lines; ++i) {
    for (int w = 0; w < 9; ++w) {
      state = state * 1664525u + 1013904223u;
      text += kWords[(state >> 16) % std::size(kWords)];
      text += w == 8 ? ".\n" : " ";
    }
  }
  return text;
}

TEST(ByteTokenizer, EveryByteReturns) {
  std::string all(256, '\0');
  std::iota(all.begin(), all.end(), 0);
  const auto tokenizer = MakeTokenizer("bytes");
  const std::vector<int32_t> ids = tokenizer->Encode(all);
  for (int i = 0; i < 256; ++i) EXPECT_EQ(ids[i], i);
  EXPECT_EQ(tokenizer->Decode(ids), all);
  EXPECT_EQ(tokenizer->vocab_size(), 257);
  EXPECT_EQ(tokenizer->end_of_document(), 256);
  EXPECT_TRUE(tokenizer->Encode("").empty());
  EXPECT_EQ(tokenizer->Decode({}), "");
}

TEST(ByteTokenizer, DecodesIdsOfALargerModel) {
  const ByteTokenizer tokenizer;
  EXPECT_EQ(tokenizer.Decode(std::vector<int32_t>{72, 256, 105, 257, -1, 33}),
            "Hi\xEF\xBF\xBD\xEF\xBF\xBD!");
}

class SentencePiece : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new TempDir;
    const std::string text = dir_->Write("prose.txt", Prose(400));
    model_ = TrainSentencePiece({.input = text, .vocab_size = 320, .output_prefix = *dir_ / "m"});
  }
  static void TearDownTestSuite() { delete dir_; }

  static inline TempDir* dir_;
  static inline std::string model_;
};

TEST_F(SentencePiece, AnyTextReturnsExactly) {
  const auto tokenizer = MakeTokenizer(model_);
  EXPECT_EQ(tokenizer->vocab_size(), 320);
  for (const std::string text :
       {"the king went unto the sea.", "", " ", "\n", "  two  spaces ", "\n\nlines\n \n",
        "tab\tand\r\nreturn", "na\xC3\xAFve \xE6\xB0\xB4 \xF0\x9F\x90\x9F", "123456", "e\xCC\x81",
        "\xEF\xAC\x81 ligature", "<s> </s> <unk> <0x41>", "unto"}) {
    const std::vector<int32_t> ids = tokenizer->Encode(text);
    EXPECT_EQ(tokenizer->Decode(ids), text);
    for (const int32_t id : ids) {
      EXPECT_GE(id, 0);
      EXPECT_LT(id, 320);
      EXPECT_NE(id, tokenizer->end_of_document());
    }
  }
}

TEST_F(SentencePiece, IsShorterThanBytes) {
  const auto tokenizer = MakeTokenizer(model_);
  const std::string text = Prose(20);
  EXPECT_LT(tokenizer->Encode(text).size() * 2, text.size());
}

TEST_F(SentencePiece, DocumentEndHasNoText) {
  const auto tokenizer = MakeTokenizer(model_);
  std::vector<int32_t> ids = tokenizer->Encode("sea");
  ids.push_back(tokenizer->end_of_document());
  EXPECT_EQ(tokenizer->Decode(ids), "sea");
  ids.push_back(320);
  ids.push_back(-5);
  for (const int32_t id : tokenizer->Encode("stone")) ids.push_back(id);
  EXPECT_EQ(tokenizer->Decode(ids), "sea\xEF\xBF\xBD\xEF\xBF\xBDstone");
}

TEST_F(SentencePiece, LongTextIsEncodedAsIfInOnePiece) {
  const auto tokenizer = MakeTokenizer(model_);
  const std::string text = Prose(20000);  // several shares
  ASSERT_GT(text.size(), 3u << 18);
  const std::vector<int32_t> ids = tokenizer->Encode(text);
  std::vector<int32_t> by_line;
  for (size_t begin = 0; begin < text.size();) {
    // Lines that begin with their break, as parts do.
    const size_t end = std::min(text.find('\n', begin + 1), text.size());
    for (const int32_t id : tokenizer->Encode(std::string_view(text).substr(begin, end - begin)))
      by_line.push_back(id);
    begin = end;
  }
  EXPECT_EQ(ids, by_line);
  const int threads = KernelThreads();
  for (const int n : {1, 3, 16}) {
    SetKernelThreads(n);
    EXPECT_EQ(tokenizer->Encode(text), ids) << n << " threads";
  }
  SetKernelThreads(threads);
  EXPECT_EQ(tokenizer->Decode(ids), text);
}

// Models as others train them: our parts give the ids of the library in one call.
TEST_F(SentencePiece, ForeignModelsEncodeAsTheirLibraryDoes) {
  const std::string prose = Prose(400), prefix = *dir_ / "foreign";
  std::string text;
  for (int i = 0; i < 400; ++i) {
    const size_t begin = i * 37 % (prose.size() / 2);
    text += prose.substr(begin, 10 + i % 90) + (i % 7 ? " " : "  ");
    if (i % 5 == 0) text += std::string(1 + i % 4, '\n') + (i % 3 ? "" : " \t");
  }
  for (const std::string options :
       {"--normalization_rule_name=identity --remove_extra_whitespaces=false --byte_fallback=true",
        "--normalization_rule_name=identity --byte_fallback=true",
        "--normalization_rule_name=nmt_nfkc",
        "--normalization_rule_name=nmt_nfkc --add_dummy_prefix=false",
        "--normalization_rule_name=identity --byte_fallback=true --add_dummy_prefix=false",
        "--normalization_rule_name=identity --remove_extra_whitespaces=false "
        "--byte_fallback=true --user_defined_symbols=\n,\n\n,\n\n\n",
        "--normalization_rule_name=identity --remove_extra_whitespaces=false "
        "--byte_fallback=true --user_defined_symbols=.\n,t\na"}) {
    const auto status = sentencepiece::SentencePieceTrainer::Train(
        "--input=" + (*dir_ / "prose.txt") + " --model_prefix=" + prefix +
        " --model_type=bpe --vocab_size=330 --hard_vocab_limit=false --minloglevel=100 " + options);
    ASSERT_TRUE(status.ok()) << status.message();
    const auto tokenizer = MakeTokenizer(prefix + ".model");
    sentencepiece::SentencePieceProcessor processor;
    ASSERT_TRUE(processor.Load(prefix + ".model").ok());
    std::vector<int> expected;
    ASSERT_TRUE(processor.Encode(text, &expected).ok());
    const std::vector<int32_t> ids = tokenizer->Encode(text);
    EXPECT_TRUE(ids == expected) << options;
    std::string decoded;
    ASSERT_TRUE(processor.Decode(expected, &decoded).ok());
    EXPECT_TRUE(tokenizer->Decode(ids) == decoded) << options;
  }
}

// A changed model is refused or works: nothing ends the program.
TEST_F(SentencePiece, DamagedModelsDoNotCrash) {
  TempDir dir;
  const std::string whole = ReadAll(model_);
  uint32_t state = 3;
  for (int trial = 0; trial < 400; ++trial) {
    std::string bytes = whole;
    state = state * 1664525u + 1013904223u;
    bytes[(state >> 8) % bytes.size()] ^= static_cast<char>(1 + (state >> 4) % 255);
    const std::string path = dir.Write("damaged.model", bytes);
    try {
      const auto tokenizer = MakeTokenizer(path);
      tokenizer->Decode(tokenizer->Encode("the king went unto the sea \xE6\xB0\xB4.\n"));
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kData);
    }
  }
}

TEST_F(SentencePiece, TrainsTheSameModelAgain) {
  const std::string again = TrainSentencePiece(
      {.input = *dir_ / "prose.txt", .vocab_size = 320, .output_prefix = *dir_ / "n"});
  EXPECT_EQ(ReadAll(again), ReadAll(model_));
}

TEST_F(SentencePiece, ThinsALargeCorpusEvenly) {
  const std::string path = TrainSentencePiece({.input = *dir_ / "prose.txt",
                                               .vocab_size = 300,
                                               .output_prefix = *dir_ / "thin",
                                               .sample_bytes = 8000});
  const auto tokenizer = MakeTokenizer(path);
  EXPECT_EQ(tokenizer->vocab_size(), 300);
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("the daughter.\n")), "the daughter.\n");
}

TEST_F(SentencePiece, TrainsOnOneLineOfAnyLength) {
  TempDir dir;
  std::string text = Prose(300);
  for (char& c : text)
    if (c == '\n') c = ' ';
  const std::string path = TrainSentencePiece(
      {.input = dir.Write("line.txt", text), .vocab_size = 300, .output_prefix = dir / "line"});
  EXPECT_EQ(MakeTokenizer(path)->vocab_size(), 300);
}

TEST_F(SentencePiece, BadModelsAndRequestsSayWhatIsWrong) {
  TempDir dir;
  ExpectDataError({"none.model", "does not exist", "\"bytes\""},
                  [&] { MakeTokenizer(dir / "none.model"); });
  ExpectDataError({"empty.model", "the file is empty"},
                  [&] { MakeTokenizer(dir.Write("empty.model", "")); });
  ExpectDataError({"garbage.model is no SentencePiece model: it is damaged or of another kind"},
                  [&] { MakeTokenizer(dir.Write("garbage.model", "this is not a model")); });
  const std::string whole = ReadAll(model_);
  for (const size_t size : {size_t{1}, whole.size() / 2, whole.size() - 1})
    ExpectDataError({"cut.model", "no SentencePiece model"},
                    [&] { MakeTokenizer(dir.Write("cut.model", whole.substr(0, size))); });
  ExpectDataError({"not a regular file"}, [&] { MakeTokenizer(dir.path()); });

  const std::string text = dir.Write("small.txt", "one two three\n");
  ExpectDataError({"cannot train 5000 pieces", "small.txt: Vocabulary size"}, [&] {
    TrainSentencePiece({.input = text, .vocab_size = 5000, .output_prefix = dir / "t"});
  });
  ExpectDataError({"a vocabulary of 259 is too small"}, [&] {
    TrainSentencePiece({.input = text, .vocab_size = 259, .output_prefix = dir / "t"});
  });
  EXPECT_FALSE(std::filesystem::exists(dir / "t.model"));
}

}  // namespace
}  // namespace shoal
