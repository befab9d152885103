#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

constexpr DType kAll[] = {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kI32,
                          DType::kI64, DType::kI8,  DType::kU8,   DType::kI16};

class Safetensors : public ::testing::Test {
 protected:
  std::string Path() const { return directory_.path() + "/x.safetensors"; }

  static std::string FileOf(const std::string& header, const std::string& data) {
    std::string file;
    for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
    return file + header + data;
  }
  void Put(const std::string& file) const {
    std::ofstream(Path(), std::ios::binary | std::ios::trunc) << file;
  }
  // What is wrong with the file; empty if it opens.
  std::string Refusal(const std::string& file) const {
    Put(file);
    try {
      SafetensorsFile opened(Path());
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kStorage);
      EXPECT_TRUE(e.message().starts_with(Path())) << e.message();
      EXPECT_LT(e.message().size(), 1000u);
      EXPECT_EQ(e.message().find('\0'), std::string::npos);
      return e.message().substr(Path().size());
    }
    return "";
  }

  TemporaryDirectory directory_;
};

// A tensor of each type with bytes that count up.
std::string WriteAll(const std::string& path) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const DType dtype : kAll) entries.push_back({Name(dtype), dtype, {3, 2, 5}});
  entries.push_back({"empty", DType::kF32, {0, 4}});
  entries.push_back({"scalar", DType::kF64, {}});
  SafetensorsWriter writer(path, entries);
  char next = 0;
  std::string all;
  for (const auto& entry : entries) {
    std::string bytes(static_cast<size_t>(entry.bytes()), '\0');
    for (char& c : bytes) c = next++;
    writer.Write(entry.name, bytes.data());
    all += bytes;
  }
  EXPECT_FALSE(std::filesystem::exists(path)) << "it is not complete yet";
  writer.Commit();
  return all;
}

TEST_F(Safetensors, RoundTripsEveryTypeAndEveryBox) {
  const std::string all = WriteAll(Path());
  const SafetensorsFile file(Path());
  ASSERT_EQ(file.entries().size(), std::size(kAll) + 2);
  for (const DType dtype : kAll) {
    const auto& entry = file.entries().at(Name(dtype));
    ASSERT_EQ(entry.dtype, dtype);
    ASSERT_EQ(entry.shape, (Dims{3, 2, 5}));
    const size_t width = SizeOf(dtype);
    const char* stored = all.data() + entry.begin;
    for (int64_t code = 0; code < 6 * 3 * 15; ++code) {
      // First and end in each dimension.
      const int64_t a = code / 45, b = code / 15 % 3, c = code % 15;
      const Dims offset = {a / 2, b / 2, c / 3};
      const Dims shape = {1 + a % 2, b == 0 ? 2 : b == 1 ? 1 : 0, 1 + c % 3};
      if (offset[0] + shape[0] > 3 || offset[1] + shape[1] > 2 || offset[2] + shape[2] > 5)
        continue;
      std::string got(static_cast<size_t>(shape.numel()) * width, '?'), expected;
      EXPECT_EQ(file.Read(Name(dtype), offset, shape, got.data()),
                static_cast<int64_t>(got.size()));
      for (int64_t i = 0; i < shape[0]; ++i)
        for (int64_t j = 0; j < shape[1]; ++j)
          for (int64_t k = 0; k < shape[2]; ++k)
            expected.append(stored + static_cast<size_t>(((offset[0] + i) * 2 + offset[1] + j) * 5 +
                                                         offset[2] + k) *
                                         width,
                            width);
      ASSERT_EQ(got, expected) << Name(dtype) << offset.ToString() << shape.ToString();
    }
  }
  EXPECT_EQ(file.Read("empty", {0, 0}, {0, 4}, nullptr), 0);
  double scalar = 0;
  EXPECT_EQ(file.Read("scalar", {}, {}, &scalar), 8);
  EXPECT_EQ(std::memcmp(&scalar, all.data() + all.size() - 8, 8), 0);
  EXPECT_THROW(file.Read("absent", {}, {}, &scalar), Error);
  EXPECT_THROW(file.Read("f32", {2, 0, 0}, {2, 2, 5}, nullptr), Error);
}

// The bytes by the format's own description.
TEST_F(Safetensors, TheBytesAreThoseOfTheFormat) {
  SafetensorsWriter writer(Path(), {{"a", DType::kI8, {2}}, {"b", DType::kF32, {1}}});
  writer.Write("a", "\1\2");
  const float one = 1;
  EXPECT_THROW(writer.Write("c", &one), Error);
  EXPECT_THROW(writer.Commit(), Error);
  writer.Write("b", &one);
  writer.Commit();
  std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},)"
      R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})";
  while (header.size() % 8 != 0) header += ' ';
  EXPECT_EQ(ReadText(Path()), FileOf(header, std::string("\1\2\0\0\x80\x3f", 6)));
}

TEST_F(Safetensors, NothingIsLeftOfAFileThatWasNotFinished) {
  { SafetensorsWriter writer(Path(), {{"a", DType::kI8, {2}}}); }
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
}

TEST_F(Safetensors, HostileHeadersAreRefusedByName) {
  const auto one = [](const std::string& fields) { return "{\"w\":{" + fields + "}}"; };
  const std::string good = one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])");
  const std::string data = "12345678";
  ASSERT_EQ(Refusal(FileOf(good, data)), "");
  ASSERT_EQ(Refusal(FileOf("{}", "")), "");
  ASSERT_EQ(Refusal(FileOf("{\"__metadata__\":{\"a\":\"b\",\"c\":\"d\"}}   ", "")), "");
  const struct {
    std::string header, words;
  } cases[] = {
      {"[]", "no JSON object"},
      {" {}", "no JSON object"},
      {"", "no JSON object"},
      {"{\"w\":3}", "\"w\" is a number and no object"},
      {"{\"w\":[]}", "\"w\" is a list and no object"},
      {"{\"w\":{}}", "\"w\" lacks its dtype"},
      {"{}x", "no JSON"},
      {"{\"w\":{\"dtype\"", "no JSON"},
      {one(R"("dtype":"F31","shape":[2],"data_offsets":[0,8])"), "unknown dtype \"F31\""},
      {one(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), "a list in \"dtype\""},
      {one(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), "a number in \"shape\""},
      {one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "a negative number"},
      {one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), "no whole number"},
      {one(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "a list in \"shape\""},
      {one(R"("dtype":"F32","shape":["2"],"data_offsets":[0,8])"), "text in \"shape\""},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "less than two data_offsets"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "more than two data_offsets"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "from 8 to 0"},
      {one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "12 bytes"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1)"), "unknown field \"x\""},
      {one(R"("dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8])"), "its shape twice"},
      {one(R"("dtype":"F32","shape":[1,1,1,1,1,1,2],"data_offsets":[0,8])"), "6 dimensions"},
      {one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"),
       "beyond 2^63 bytes"},
      {one(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0])"),
       "beyond 2^63 bytes"},
      {one(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"), "beyond 2^63"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,0])"), "beyond 2^63"},
      {one(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])"), "behind a hole"},
      {R"({"a":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},)"
       R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       "\"b\" begins at byte 4, inside"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
       R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       "\"b\" begins at byte 4, behind a hole"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
       R"("a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       "\"a\" comes twice"},
      {one(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])"), "goes on behind its tensors"},
      {one(R"("dtype":"F64","shape":[2],"data_offsets":[0,16])"), "is cut short"},
      {R"({"a\u0000b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})", "control character"},
      {R"({"":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})", "without a name"},
      {"{\"\xff\":1}", "no JSON"},
      {R"({"__metadata__":{"a":1}})", "a number in \"a\""},
      {R"({"__metadata__":{"a":{}}})", "an object in \"a\""},
      {R"({"__metadata__":{},"__metadata__":{}})", "comes twice"},
      {"{\"w\":" + std::string(1 << 20, '['), "a list"},
      {"{\"w\":" + std::string(1 << 20, '{'), "no JSON"},
      {"{\"" + std::string(1 << 20, 'n') + "\":1}", "nnn"},
  };
  for (const auto& [header, words] : cases) {
    const std::string refusal = Refusal(FileOf(header, data));
    EXPECT_NE(refusal.find(words), std::string::npos)
        << header.substr(0, 200) << "\nis refused with: " << refusal;
  }
  // Lengths that the file does not have, of which nothing may be asked for.
  for (const uint64_t length :
       {uint64_t{9}, uint64_t{100'000'001}, uint64_t{1} << 62, ~uint64_t{0}}) {
    std::string file = FileOf("{}", "123456");
    for (int i = 0; i < 8; ++i) file[static_cast<size_t>(i)] = static_cast<char>(length >> (8 * i));
    EXPECT_NE(Refusal(file).find("could have 8"), std::string::npos);
  }
  EXPECT_NE(Refusal("1234567").find("is cut short"), std::string::npos);
}

TEST_F(Safetensors, WhatIsNoFileIsRefused) {
  for (const std::string& path : {directory_.path(), Path(), std::string("/dev/null")})
    EXPECT_THROW(SafetensorsFile{path}, Error) << path;
}

// A header that was changed anywhere is refused, or describes tensors that are there.
TEST_F(Safetensors, MutatedFilesAreRefusedOrWhole) {
  WriteAll(Path());
  const std::string good = ReadText(Path());
  const SafetensorsFile whole(Path());
  const size_t header = good.size() - static_cast<size_t>(whole.entries().at("scalar").end);
  int refused = 0, opened = 0;
  const auto check = [&](const std::string& file) {
    if (!Refusal(file).empty()) {
      ++refused;
      return;
    }
    ++opened;
    const SafetensorsFile tensors(Path());
    int64_t bytes = 0;
    for (const auto& [name, entry] : tensors.entries()) {
      bytes += entry.end - entry.begin;
      if (!entry.dtype) continue;
      std::string data(static_cast<size_t>(entry.end - entry.begin), '\0');
      Dims offset = entry.shape;
      for (int d = 0; d < offset.rank(); ++d) offset[d] = 0;
      EXPECT_EQ(tensors.Read(name, offset, entry.shape, data.data()),
                static_cast<int64_t>(data.size()));
    }
    EXPECT_LT(bytes, static_cast<int64_t>(file.size()));
  };
  for (size_t n = 0; n < good.size(); n += n < header ? 3 : 97) {
    check(good.substr(0, n));
    EXPECT_EQ(opened, 0) << "cut at " << n;
  }
  std::mt19937 random(7);
  const auto below = [&](size_t n) { return random() % n; };
  const std::string pieces[] = {"{", "}", "[", "]", "\"", ",", ":", "0", "9", "-", "e", "\\u0000"};
  for (int i = 0; i < 1600; ++i) {
    std::string file = good;
    for (size_t changes = 1 + below(3); changes > 0; --changes) {
      const size_t at = below(header);
      switch (below(5)) {
        case 0:
          file[at] = static_cast<char>(file[at] ^ (1 << below(8)));
          break;
        case 1:
          file[at] = static_cast<char>(random());
          break;
        case 2:
          file.replace(at, 1, pieces[below(std::size(pieces))]);
          break;
        case 3:
          file.erase(at, 1 + below(20));
          break;
        default:
          file.insert(at, file.substr(below(header), 1 + below(60)));
      }
      // Most of what follows the length is only reached with the right one.
      if (below(4) == 0) continue;
      const size_t length = file.size() - (good.size() - header) - 8;
      for (size_t b = 0; b < 8; ++b) file[b] = static_cast<char>(length >> (8 * b));
    }
    check(file);
  }
  EXPECT_GT(refused, 1200);
  EXPECT_GT(opened, 10) << "all are refused: the mutations go nowhere";
}

}  // namespace
}  // namespace shoal
