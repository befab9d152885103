#include "launch/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/philox.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

StepMetrics Example(int64_t step) {
  StepMetrics m;
  m.step = step;
  m.loss = 1.0 / 3.0 + static_cast<double>(step);
  m.grad_norm = 0.1;
  m.lr = 1e-8;
  m.tokens = step * 4096;
  m.seconds = 0.25;
  m.tokens_per_second = 16384;
  m.peak_bytes = {{"parameters", 1}, {"activations", int64_t{1} << 52}, {"peak", 3}};
  m.wire_bytes = {{"dp", 7}, {"tp", 0}, {"pp", 0}, {"cp", 0}, {"ep", 0}, {"control", 24}};
  m.host_gap_seconds = 0;
  if (step % 2 == 0) m.validation_loss = 2.5;
  return m;
}

TEST(Metrics, LineHasExactlyTheKeysOfTheContract) {
  const auto line = nlohmann::ordered_json::parse(ToJsonLine(Example(1)));
  std::vector<std::string> keys;
  for (const auto& [key, value] : line.items()) keys.push_back(key);
  EXPECT_EQ(keys, (std::vector<std::string>{"step", "loss", "grad_norm", "lr", "tokens", "seconds",
                                            "tokens_per_second", "peak_bytes", "wire_bytes",
                                            "host_gap_seconds"}));
  EXPECT_TRUE(nlohmann::json::parse(ToJsonLine(Example(2))).contains("validation_loss"));
  EXPECT_TRUE(line["loss"].is_number_float());
  EXPECT_EQ(line["wire_bytes"].size(), 6);
  EXPECT_EQ(line["peak_bytes"]["activations"], int64_t{1} << 52);
}

TEST(Metrics, FloatsReadBackExactly) {
  int checked = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    const Philox4 word = Philox({42, 7}, i);
    const double value = std::bit_cast<double>((uint64_t{word.v[0]} << 32) | word.v[1]);
    if (!std::isfinite(value)) continue;
    StepMetrics m = Example(1);
    m.loss = value;
    m.validation_loss = -value;
    const auto back = ParseMetrics(ToJsonLine(m));
    ASSERT_TRUE(back);
    ASSERT_EQ(*back, m) << ToJsonLine(m);
    ++checked;
  }
  EXPECT_GT(checked, 19000);
  for (const double value :
       {0.0, -0.0, 5e-324, 1.7976931348623157e308, 1.0, 1e15, 1e16, 1e22, 0.1}) {
    StepMetrics m = Example(1);
    m.lr = value;
    EXPECT_EQ(std::bit_cast<uint64_t>(ParseMetrics(ToJsonLine(m))->lr),
              std::bit_cast<uint64_t>(value));
  }
}

TEST(Metrics, NotANumberIsLegible) {
  StepMetrics m = Example(1);
  m.loss = std::nan("");
  m.grad_norm = std::numeric_limits<double>::infinity();
  m.validation_loss = -std::numeric_limits<double>::infinity();
  const std::string line = ToJsonLine(m);
  EXPECT_EQ(nlohmann::json::parse(line)["loss"], "NaN");
  const auto back = ParseMetrics(line);
  ASSERT_TRUE(back);
  EXPECT_TRUE(std::isnan(back->loss));
  EXPECT_EQ(back->grad_norm, m.grad_norm);
  EXPECT_EQ(back->validation_loss, m.validation_loss);
}

TEST(Metrics, EveryTornLineIsSeen) {
  const std::string line = ToJsonLine(Example(2));
  for (size_t length = 0; length < line.size(); ++length)
    EXPECT_FALSE(ParseMetrics(line.substr(0, length))) << length;
  for (const char* bad : {"", "null", "[]", "{}", "3", "\"x\"", "{\"step\": 1}", "\xff\xfe", "{{}"})
    EXPECT_FALSE(ParseMetrics(bad)) << bad;
  std::string wrong = line;
  wrong.replace(wrong.find("{\"parameters\""), 1, "5, \"z\": {");
  EXPECT_FALSE(ParseMetrics(wrong));
  EXPECT_TRUE(ParseMetrics("{\"more\": [1, 2], " + line.substr(1)));
}

void WriteSteps(const std::string& path, int64_t first, int64_t last) {
  MetricsWriter writer(path);
  for (int64_t step = first; step <= last; ++step) writer.Write(Example(step));
  writer.Sync();
}

void Append(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::app | std::ios::binary) << text;
}

TEST(Metrics, WriterAppends) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/metrics.jsonl";
  EXPECT_EQ(ReadMetrics(path).steps.size(), 0);
  WriteSteps(path, 1, 3);
  WriteSteps(path, 4, 5);
  const MetricsFile file = ReadMetrics(path);
  ASSERT_EQ(file.steps.size(), 5);
  EXPECT_EQ(file.skipped_lines, 0);
  EXPECT_EQ(file.steps[4], Example(5));
}

TEST(Metrics, CutDropsTornAndLaterLines) {
  const TemporaryDirectory tmp;
  const std::string path = tmp.path() + "/metrics.jsonl";
  EXPECT_EQ(CutMetrics(path, 3), 0);
  WriteSteps(path, 1, 5);
  const std::string five = ReadText(path);
  EXPECT_EQ(CutMetrics(path, 5), 0);
  EXPECT_EQ(ReadText(path), five);
  // A torn end at every length, an end that only lacks its newline among them.
  const std::string six = ToJsonLine(Example(6));
  for (size_t length : {size_t{1}, six.size() / 2, six.size() - 1, six.size()}) {
    Append(path, six.substr(0, length));
    EXPECT_EQ(CutMetrics(path, 6), 1);
    ASSERT_EQ(ReadText(path), five) << length;
  }
  EXPECT_EQ(CutMetrics(path, 3), 2);
  EXPECT_EQ(ReadMetrics(path).steps.back(), Example(3));
  Append(path, "garbage\n\n" + ToJsonLine(Example(2)) + "\n" + ToJsonLine(Example(4)) + "\n");
  EXPECT_EQ(CutMetrics(path, 4), 3);
  EXPECT_EQ(ReadMetrics(path).steps.size(), 4);
  EXPECT_EQ(CutMetrics(path, 0), 4);
  EXPECT_EQ(ReadText(path), "");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(tmp.path()), {}), 1);
}

TEST(Metrics, NoPlaceToWrite) {
  try {
    MetricsWriter writer("/nonexistent/metrics.jsonl");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kStorage);
  }
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  MetricsWriter full("/dev/full");
  try {
    full.Write(Example(1));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kStorage);
    EXPECT_THAT(e.message(), ::testing::HasSubstr("no space left"));
  }
}

}  // namespace
}  // namespace shoal
