// From text to files of ids and back.
#include "data/build.h"

#include <gtest/gtest.h>

#include "core/base/build_config.h"
#include "data/loader.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;
using testing::ExpectError;
using testing::ReadAll;
using testing::TempDir;

std::vector<int32_t> All(const TokenSource& source) {
  std::vector<int32_t> ids(source.size());
  source.Read(0, ids);
  return ids;
}

void WriteTexts(const TempDir& dir) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += "walking by the river, verse " + std::to_string(i) + "\n";
  dir.Write("in/a.txt", text);
  dir.Write("in/b/c.txt", "na\xC3\xAFve \xE6\xB0\xB4\n");
  dir.Write("in/d.txt", "x");
}

std::vector<std::string> Outputs() {
  std::vector<std::string> outputs = {"out", "out2.bin", "out3.idx"};
  if (kHaveHdf5) outputs.insert(outputs.end(), {"out.h5", "out.hdf5"});
  return outputs;
}

TEST(Build, AFileOfIdsIsTheTextItCameFrom) {
  TempDir dir;
  WriteTexts(dir);
  const ByteTokenizer tokenizer;
  const auto text = OpenCorpus({.path = dir / "in", .tokenizer = &tokenizer, .vocab = 257});
  for (const std::string& output : Outputs()) {
    const BuildResult result = BuildDataset({.input = dir / "in", .output = dir / output});
    EXPECT_EQ(result.tokens, text->size());
    EXPECT_EQ(result.documents, 3);
    EXPECT_EQ(result.text_bytes, text->info().stored_bytes);
    EXPECT_EQ(result.dtype, "u16");
    EXPECT_EQ(result.tokenizer, "bytes");
    EXPECT_EQ(result.vocab, 257);
    const auto built = OpenCorpus({.path = dir / output, .vocab = 257});
    EXPECT_EQ(All(*built), All(*text));
    EXPECT_EQ(Fingerprint(*built), Fingerprint(*text));
    EXPECT_EQ(built->info().documents, 3);
    for (int64_t i = 0; i < text->size(); ++i)
      ASSERT_EQ(built->NextDocument(i, text->size()), text->NextDocument(i, text->size())) << i;
    // Packed batches are the same too.
    const LoaderOptions options{.sequence_length = 50, .seed = 3, .documents = true};
    const Batch a = Loader(text, options).Train(2, 8, 0, 8),
                b = Loader(built, options).Train(2, 8, 0, 8);
    EXPECT_EQ(a.labels, b.labels);
    EXPECT_EQ(a.documents, b.documents);
    for (const std::string& file : result.files) EXPECT_TRUE(std::filesystem::exists(file)) << file;
  }
}

TEST(Build, TrainsAModelAndUsesIt) {
  for (const std::string& output : Outputs()) {
    TempDir dir;
    WriteTexts(dir);
    const BuildResult result =
        BuildDataset({.input = dir / "in", .output = dir / output, .train_vocab = 300});
    EXPECT_TRUE(result.tokenizer.ends_with(".model")) << result.tokenizer;
    EXPECT_EQ(result.vocab, 300);
    EXPECT_EQ(dir.FileCount(), 1 + result.files.size());  // nothing temporary is left
    const auto tokenizer = MakeTokenizer(result.tokenizer);
    const auto built = OpenCorpus({.path = dir / output, .vocab = 300});
    const auto text = OpenCorpus({.path = dir / "in", .tokenizer = tokenizer.get(), .vocab = 300});
    EXPECT_EQ(All(*built), All(*text));
    EXPECT_LT(built->size() * 3, result.text_bytes * 2);

    const DatasetSummary summary =
        InspectDataset({.path = dir / output, .tokenizer = tokenizer.get()}, 3, 4096);
    EXPECT_EQ(summary.documents, 3);
    ASSERT_EQ(summary.samples.size(), 3u);
    EXPECT_EQ(summary.samples[1], "na\xC3\xAFve \xE6\xB0\xB4\n");
    EXPECT_EQ(summary.samples[2], "x");
    EXPECT_LT(summary.largest_id, 300);
    EXPECT_EQ(summary.fingerprint, Fingerprint(*text));
  }
}

TEST(Build, WritesTheModelWhereItIsNamed) {
  TempDir dir;
  WriteTexts(dir);
  const BuildResult result = BuildDataset({.input = dir / "in",
                                           .output = dir / "out",
                                           .tokenizer = dir / "mine.model",
                                           .train_vocab = 300});
  EXPECT_EQ(result.tokenizer, dir / "mine.model");
  const BuildResult again =
      BuildDataset({.input = dir / "in", .output = dir / "again", .tokenizer = dir / "mine.model"});
  EXPECT_EQ(ReadAll(dir / "again.bin"), ReadAll(dir / "out.bin"));
  EXPECT_EQ(again.vocab, 300);
  ExpectError(ErrorKind::kConfig, {"mine.spm", ".model"}, [&] {
    BuildDataset({.input = dir / "in",
                  .output = dir / "other",
                  .tokenizer = dir / "mine.spm",
                  .train_vocab = 300});
  });
}

TEST(Build, OverwritesOnlyWhenAsked) {
  TempDir dir;
  WriteTexts(dir);
  for (const std::string& output : Outputs()) {
    BuildDataset({.input = dir / "in", .output = dir / output});
    ExpectError(ErrorKind::kStorage, {"exists"},
                [&] { BuildDataset({.input = dir / "in/d.txt", .output = dir / output}); });
    EXPECT_GT(OpenCorpus({.path = dir / output})->size(), 1000);
    BuildDataset({.input = dir / "in/d.txt", .output = dir / output, .overwrite = true});
    EXPECT_EQ(All(*OpenCorpus({.path = dir / output})), (std::vector<int32_t>{'x', 256}));
  }
}

TEST(Build, AFailureLeavesNothing) {
  TempDir dir;
  WriteTexts(dir);
  dir.Write("bad/a.txt", "good text");
  dir.Write("bad/b.txt", std::string("\0\0", 2));
  std::filesystem::create_directory(dir / "void");
  const size_t before = dir.FileCount();
  for (const std::string& output : Outputs()) {
    ExpectDataError({"b.txt is not text"},
                    [&] { BuildDataset({.input = dir / "bad", .output = dir / output}); });
    ExpectDataError({"none"},
                    [&] { BuildDataset({.input = dir / "none", .output = dir / output}); });
    ExpectDataError({"holds no text"},
                    [&] { BuildDataset({.input = dir / "void", .output = dir / output}); });
    ExpectDataError({"cannot train 90000 pieces"}, [&] {
      BuildDataset({.input = dir / "in", .output = dir / output, .train_vocab = 90000});
    });
    ExpectDataError({"no.model does not exist"}, [&] {
      BuildDataset({.input = dir / "in", .output = dir / output, .tokenizer = dir / "no.model"});
    });
  }
  EXPECT_EQ(dir.FileCount(), before);
  ExpectError(ErrorKind::kStorage, {"nowhere", "does not exist"},
              [&] { BuildDataset({.input = dir / "in", .output = dir / "nowhere/out"}); });
  ExpectError(ErrorKind::kConfig, {"has no name"},
              [&] { BuildDataset({.input = dir / "in", .output = ""}); });
  ExpectError(ErrorKind::kConfig, {"has no name"},
              [&] { BuildDataset({.input = dir / "in", .output = dir / ".h5"}); });
}

TEST(Build, AFullDiskIsAStorageError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP();
  // A temporary name that leads to a device without space.
  TempDir dir;
  WriteTexts(dir);
  const std::string temporary = fmt::format("{}.partial-{}", dir / "out.bin", getpid());
  std::filesystem::create_symlink("/dev/full", temporary);
  ExpectError(ErrorKind::kStorage, {"out.bin", "No space left"},
              [&] { BuildDataset({.input = dir / "in", .output = dir / "out"}); });
  EXPECT_FALSE(std::filesystem::exists(dir / "out.idx"));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.bin"));
}

TEST(Inspect, CountsAndDecodesText) {
  TempDir dir;
  WriteTexts(dir);
  const ByteTokenizer tokenizer;
  const DatasetSummary summary =
      InspectDataset({.path = dir / "in", .tokenizer = &tokenizer}, 2, 10);
  EXPECT_EQ(summary.info.format, "text");
  EXPECT_EQ(summary.documents, 3);
  EXPECT_EQ(summary.tokens, summary.info.stored_bytes + 3);
  EXPECT_EQ(summary.smallest_id, '\n');
  EXPECT_EQ(summary.largest_id, 256);
  EXPECT_EQ(summary.samples, (std::vector<std::string>{"walking by", "na\xC3\xAFve \xE6\xB0\xB4"}));
}

TEST(Inspect, WithoutATokenizerThereAreNoSamples) {
  TempDir dir;
  WriteTexts(dir);
  BuildDataset({.input = dir / "in", .output = dir / "out"});
  const DatasetSummary summary = InspectDataset({.path = dir / "out"});
  EXPECT_TRUE(summary.samples.empty());
  EXPECT_EQ(summary.documents, 3);
  EXPECT_EQ(summary.info.dtype, "u16");
}

}  // namespace
}  // namespace shoal
