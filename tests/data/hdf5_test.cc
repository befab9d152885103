// HDF5 files as other programs make them, good and bad.
#include <gtest/gtest.h>

#include "core/base/build_config.h"
#include "data/hdf5_file.h"

#if SHOAL_HAVE_HDF5
#include <hdf5.h>

#include <thread>

#include "data/loader.h"
#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

using testing::ExpectDataError;
using testing::ReadAll;
using testing::TempDir;

struct DatasetOptions {
  hid_t memory = H5T_NATIVE_INT32, stored = H5T_NATIVE_INT32;
  std::vector<hsize_t> dims;
  hsize_t chunk = 0;  // of the first dimension; 0: contiguous
  bool compress = false;
};

class File {
 public:
  explicit File(const std::string& path, hsize_t user_block = 0) {
    const hid_t plist = H5Pcreate(H5P_FILE_CREATE);
    if (user_block) H5Pset_userblock(plist, user_block);
    id_ = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, plist, H5P_DEFAULT);
    H5Pclose(plist);
  }
  ~File() { H5Fclose(id_); }
  hid_t id() const { return id_; }

  template <class T>
  void Write(const std::string& name, const std::vector<T>& values, DatasetOptions o) const {
    if (o.dims.empty()) o.dims = {values.size()};
    const hid_t space = H5Screate_simple(static_cast<int>(o.dims.size()), o.dims.data(), nullptr);
    const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
    const hid_t links = H5Pcreate(H5P_LINK_CREATE);
    H5Pset_create_intermediate_group(links, 1);
    if (o.chunk) {
      std::vector<hsize_t> chunk = o.dims;
      chunk[0] = o.chunk;
      H5Pset_chunk(plist, static_cast<int>(chunk.size()), chunk.data());
      if (o.compress) H5Pset_deflate(plist, 6);
    }
    const hid_t set = H5Dcreate2(id_, name.c_str(), o.stored, space, links, plist, H5P_DEFAULT);
    ASSERT_GE(set, 0);
    if (!values.empty()) {
      ASSERT_GE(H5Dwrite(set, o.memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
    }
    H5Dclose(set);
    H5Pclose(links);
    H5Pclose(plist);
    H5Sclose(space);
  }

 private:
  hid_t id_;
};

std::vector<int32_t> All(const TokenSource& source) {
  std::vector<int32_t> ids(source.size());
  source.Read(0, ids);
  return ids;
}

const std::vector<int32_t> kIds = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 100};

TEST(Hdf5, EveryIntegerTypeOrderAndLayout) {
  TempDir dir;
  const std::pair<hid_t, const char*> types[] = {
      {H5T_STD_U8LE, "u8"},   {H5T_STD_I8LE, "i8"},   {H5T_STD_U16LE, "u16"},
      {H5T_STD_I16LE, "i16"}, {H5T_STD_U32LE, "u32"}, {H5T_STD_I32LE, "i32"},
      {H5T_STD_U64LE, "u64"}, {H5T_STD_I64LE, "i64"}, {H5T_STD_U16BE, "u16"},
      {H5T_STD_I32BE, "i32"}, {H5T_STD_I64BE, "i64"}};
  for (const auto& [type, name] : types) {
    for (const hsize_t chunk : {0, 5}) {
      for (const hsize_t user_block : {0, 512}) {
        const std::string path = dir / "d.h5";
        File(path, user_block)
            .Write("tokens", kIds, {.stored = type, .chunk = chunk, .compress = chunk > 0});
        const auto source = OpenCorpus({.path = path, .vocab = 101});
        EXPECT_EQ(All(*source), kIds) << name;
        EXPECT_EQ(source->info().dtype, name);
        EXPECT_EQ(source->info().format, "hdf5");
        EXPECT_FALSE(source->has_documents());
        ExpectDataError({"d.h5: token 11 has the id 100", "vocabulary of 100"},
                        [&] { OpenCorpus({.path = path, .vocab = 100}); });
      }
    }
  }
}

TEST(Hdf5, FindsTheTokens) {
  TempDir dir;
  {
    const File file(dir / "named.h5");
    file.Write("labels", kIds, {});
    file.Write("tokens", std::vector<int32_t>{7, 8}, {});
  }
  EXPECT_EQ(All(*OpenCorpus({.path = dir / "named.h5"})), (std::vector<int32_t>{7, 8}));
  {
    const File file(dir / "only.hdf5");
    file.Write("weights", std::vector<double>{1, 2},
               {.memory = H5T_NATIVE_DOUBLE, .stored = H5T_NATIVE_DOUBLE});
    file.Write("train/deep/ids", kIds, {});
  }
  EXPECT_EQ(All(*OpenCorpus({.path = dir / "only.hdf5"})), kIds);
  // Known by its first bytes where the name does not say.
  std::filesystem::rename(dir / "only.hdf5", dir / "corpus");
  EXPECT_EQ(All(*OpenCorpus({.path = dir / "corpus"})), kIds);
}

TEST(Hdf5, RowsAreDocuments) {
  TempDir dir;
  for (const hsize_t chunk : {0, 1}) {
    File(dir / "rows.h5").Write("tokens", kIds, {.dims = {4, 3}, .chunk = chunk});
    const auto source = OpenCorpus({.path = dir / "rows.h5"});
    EXPECT_EQ(All(*source), kIds);
    EXPECT_EQ(source->info().documents, 4);
    EXPECT_EQ(source->NextDocument(0, 12), 3);
    EXPECT_EQ(source->NextDocument(3, 12), 6);
    EXPECT_EQ(source->NextDocument(9, 12), 12);
    const Loader loader(source, {.sequence_length = 11, .documents = true});
    const Batch batch = loader.Train(0, 1, 0, 1);
    EXPECT_EQ(batch.positions, (std::vector<int32_t>{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1}));
    EXPECT_EQ(batch.labels, (std::vector<int32_t>{1, 4, -1, 5, 9, -1, 6, 5, -1, 5, 100}));
  }
  File(dir / "cube.h5").Write("tokens", kIds, {.dims = {2, 2, 3}});
  EXPECT_EQ(OpenCorpus({.path = dir / "cube.h5"})->NextDocument(0, 12), 6);
}

TEST(Hdf5, AnEndIdGivenWithTheRunSeparatesDocuments) {
  TempDir dir;
  File(dir / "flat.h5").Write("tokens", kIds, {});
  const auto source = OpenCorpus({.path = dir / "flat.h5", .end_of_document = 5});
  EXPECT_TRUE(source->has_documents());
  EXPECT_EQ(source->NextDocument(0, 12), 5);
  EXPECT_EQ(source->NextDocument(5, 12), 9);
  EXPECT_EQ(source->NextDocument(9, 12), 11);
  EXPECT_EQ(source->NextDocument(11, 12), 12);
  ExpectDataError({"does not say where documents begin"}, [&] {
    Loader(OpenCorpus({.path = dir / "flat.h5"}), {.sequence_length = 2, .documents = true});
  });
}

TEST(Hdf5, WhatCannotBeUsedIsNamed) {
  TempDir dir;
  const auto open = [&](const std::string& name) { OpenCorpus({.path = dir / name}); };
  ExpectDataError({"none.h5", "No such file"}, [&] { open("none.h5"); });
  dir.Write("empty.h5", "");
  ExpectDataError({"empty.h5 as HDF5"}, [&] { open("empty.h5"); });
  dir.Write("text.h5", "In the beginning was text, and it was not HDF5 at all.");
  ExpectDataError({"text.h5 as HDF5", "signature not found"}, [&] { open("text.h5"); });
  { const File file(dir / "bare.h5"); }
  ExpectDataError({"bare.h5 holds no dataset of integers"}, [&] { open("bare.h5"); });
  File(dir / "float.h5")
      .Write("tokens", std::vector<float>{1, 2},
             {.memory = H5T_NATIVE_FLOAT, .stored = H5T_NATIVE_FLOAT});
  ExpectDataError({"float.h5 holds no dataset of integers (only: tokens)"},
                  [&] { open("float.h5"); });
  {
    const File file(dir / "two.h5");
    file.Write("a", kIds, {});
    file.Write("b", kIds, {});
  }
  ExpectDataError({"several datasets of integers (a, b)", "\"tokens\""}, [&] { open("two.h5"); });
  File(dir / "zero.h5").Write("tokens", std::vector<int32_t>{}, {});
  ExpectDataError({"zero.h5", "is empty"}, [&] { open("zero.h5"); });
  {
    const File file(dir / "scalar.h5");
    const hid_t space = H5Screate(H5S_SCALAR);
    H5Dclose(H5Dcreate2(file.id(), "tokens", H5T_NATIVE_INT32, space, H5P_DEFAULT, H5P_DEFAULT,
                        H5P_DEFAULT));
    H5Sclose(space);
  }
  ExpectDataError({"scalar.h5 holds no dataset of integers"}, [&] { open("scalar.h5"); });
  for (const std::vector<int64_t>& starts :
       {std::vector<int64_t>{1, 2}, {0, 12}, {0, 2, 2}, {0, 5, 3}, {-1}}) {
    const File file(dir / "starts.h5");
    file.Write("tokens", kIds, {});
    file.Write("documents", starts, {.memory = H5T_NATIVE_INT64, .stored = H5T_NATIVE_INT64});
    H5Fflush(file.id(), H5F_SCOPE_GLOBAL);
    ExpectDataError({"\"documents\" must begin with 0"}, [&] { open("starts.h5"); });
  }
}

TEST(Hdf5, ATruncatedFileIsRefusedAtEveryLength) {
  TempDir dir;
  std::vector<int32_t> ids(5000);
  for (int i = 0; i < 5000; ++i) ids[i] = i;
  for (const hsize_t chunk : {0, 700}) {
    File(dir / "whole.h5").Write("tokens", ids, {.chunk = chunk, .compress = chunk > 0});
    const std::string whole = ReadAll(dir / "whole.h5");
    for (size_t size = 0; size < whole.size(); size += 1 + size / 7) {
      dir.Write("cut.h5", whole.substr(0, size));
      ExpectDataError({"cut.h5"}, [&] { OpenCorpus({.path = dir / "cut.h5"}); });
    }
    dir.Write("cut.h5", whole.substr(0, whole.size() - 1));
    ExpectDataError({"cut.h5", "truncated file"}, [&] { OpenCorpus({.path = dir / "cut.h5"}); });
  }
}

TEST(Hdf5, PrintsNothingAndRestoresTheLibrarysVoice) {
  TempDir dir;
  dir.Write("text.h5", "not HDF5");
  H5E_auto2_t before = nullptr, after = nullptr;
  void* data = nullptr;
  H5Eget_auto2(H5E_DEFAULT, &before, &data);
  ::testing::internal::CaptureStderr();
  EXPECT_THROW(OpenCorpus({.path = dir / "text.h5"}), Error);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  H5Eget_auto2(H5E_DEFAULT, &after, &data);
  EXPECT_EQ(before, after);
}

TEST(Hdf5, ThreadsOpenAndReadTogether) {
  TempDir dir;
  File(dir / "d.h5").Write("tokens", kIds, {.chunk = 5, .compress = true});
  std::vector<std::thread> threads;
  std::vector<int> good(8);
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) good[t] += All(*OpenCorpus({.path = dir / "d.h5"})) == kIds;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(8, 20));
}

}  // namespace
}  // namespace shoal

#else

#include "tests/data/temp_dir.h"

namespace shoal {
namespace {

TEST(Hdf5, ABuildWithoutItSaysSo) {
  testing::TempDir dir;
  dir.Write("d.h5", "x");
  testing::ExpectDataError({"d.h5 is HDF5, which this build of Shoal leaves out", "SHOAL_HDF5=ON"},
                           [&] { OpenCorpus({.path = dir / "d.h5"}); });
}

}  // namespace
}  // namespace shoal

#endif
