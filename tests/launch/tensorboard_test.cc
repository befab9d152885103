// Reads event files back with a decoder of its own: bitwise CRC, generic protobuf fields.
#include "launch/tensorboard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <variant>

#include "core/base/error.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

uint32_t SlowCrc(const std::string& data) {
  uint32_t crc = 0xffffffffu;
  for (const unsigned char byte : data) {
    crc ^= byte;
    for (int i = 0; i < 8; ++i) crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
  }
  return ~crc;
}

uint32_t Unmask(uint32_t masked) {
  const uint32_t rotated = masked - 0xa282ead8u;
  return (rotated << 15) | (rotated >> 17);
}

template <class T>
T ReadFixed(const std::string& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

struct Field {
  uint64_t integer = 0;  // varint or the bits of a fixed value
  std::string bytes;
};
using Message = std::multimap<int, Field>;

Message Decode(const std::string& bytes) {
  Message message;
  size_t at = 0;
  const auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const auto byte = static_cast<unsigned char>(bytes.at(at++));
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < bytes.size()) {
    const uint64_t tag = varint();
    Field field;
    switch (tag & 7) {
      case 0:
        field.integer = varint();
        break;
      case 1:
        field.integer = ReadFixed<uint64_t>(bytes, at);
        at += 8;
        break;
      case 5:
        field.integer = ReadFixed<uint32_t>(bytes, at);
        at += 4;
        break;
      case 2: {
        const uint64_t size = varint();
        field.bytes = bytes.substr(at, size);
        EXPECT_EQ(field.bytes.size(), size);
        at += size;
        break;
      }
      default:
        ADD_FAILURE() << "wire type " << (tag & 7);
        return message;
    }
    message.emplace(static_cast<int>(tag >> 3), field);
  }
  return message;
}

std::vector<Message> ReadEvents(const std::string& path) {
  const std::string bytes = ReadText(path);
  std::vector<Message> events;
  size_t at = 0;
  while (at < bytes.size()) {
    const auto length = ReadFixed<uint64_t>(bytes, at);
    EXPECT_EQ(Unmask(ReadFixed<uint32_t>(bytes, at + 8)), SlowCrc(bytes.substr(at, 8)));
    const std::string payload = bytes.substr(at + 12, length);
    EXPECT_EQ(payload.size(), length);
    EXPECT_EQ(Unmask(ReadFixed<uint32_t>(bytes, at + 12 + length)), SlowCrc(payload));
    events.push_back(Decode(payload));
    at += 16 + length;
  }
  EXPECT_EQ(at, bytes.size());
  return events;
}

std::map<std::string, float> Scalars(const Message& event) {
  std::map<std::string, float> scalars;
  const Message summary = Decode(event.find(5)->second.bytes);
  for (auto [it, end] = summary.equal_range(1); it != end; ++it) {
    const Message value = Decode(it->second.bytes);
    const auto bits = static_cast<uint32_t>(value.find(2)->second.integer);
    float number;
    std::memcpy(&number, &bits, 4);
    scalars[value.find(1)->second.bytes] = number;
  }
  return scalars;
}

StepMetrics Example(int64_t step) {
  StepMetrics m;
  m.step = step;
  m.loss = 5.0 / static_cast<double>(step);
  m.grad_norm = 0.5;
  m.lr = 1e-3;
  m.tokens_per_second = 1000;
  m.peak_bytes = {{"parameters", 100}, {"peak", step < 3 ? 200 : 300}};
  m.wire_bytes = {{"dp", int64_t{1} << 40}, {"control", 8}};
  if (step == 2) m.validation_loss = 1.5;
  return m;
}

TEST(TensorBoard, CrcIsCastagnoli) {
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);  // RFC 3720, B.4
  EXPECT_EQ(Crc32c(""), 0u);
  EXPECT_EQ(Crc32c("\xff\x80 abc"), SlowCrc("\xff\x80 abc"));
}

TEST(TensorBoard, EventsReadBack) {
  const TemporaryDirectory tmp;
  std::string path;
  {
    TensorBoardWriter writer(tmp.path());
    path = writer.path();
    for (int64_t step = 1; step <= 300; ++step) writer.Write(Example(step));
  }
  EXPECT_NE(std::filesystem::path(path).filename().string().find("tfevents"), std::string::npos);
  const std::vector<Message> events = ReadEvents(path);
  ASSERT_EQ(events.size(), 301);
  EXPECT_EQ(events[0].find(3)->second.bytes, "brain.Event:2");
  for (int64_t step = 1; step <= 300; ++step) {
    const Message& event = events[static_cast<size_t>(step)];
    EXPECT_EQ(event.find(2)->second.integer, static_cast<uint64_t>(step));
    double time;
    std::memcpy(&time, &event.find(1)->second.integer, 8);
    EXPECT_GT(time, 1.7e9);
    const auto scalars = Scalars(event);
    EXPECT_EQ(scalars.at("loss/train"), static_cast<float>(5.0 / static_cast<double>(step)));
    EXPECT_EQ(scalars.count("loss/validation"), step == 2);
    EXPECT_EQ(scalars.count("peak_bytes/peak"), step == 1 || step == 3);
    EXPECT_EQ(scalars.count("wire_bytes/dp"), step == 1);
    EXPECT_EQ(event.count(7), 0);
  }
  EXPECT_EQ(Scalars(events[1]).at("wire_bytes/dp"), 0x1p40f);
}

TEST(TensorBoard, ResumedRunReplacesLaterSteps) {
  const TemporaryDirectory tmp;
  std::string first, second;
  {
    TensorBoardWriter writer(tmp.path());
    first = writer.path();
    writer.Write(Example(1));
  }
  TensorBoardWriter writer(tmp.path());
  second = writer.path();
  writer.Write(Example(7));
  EXPECT_NE(first, second);
  const std::vector<Message> events = ReadEvents(second);
  ASSERT_EQ(events.size(), 3);
  EXPECT_EQ(events[1].find(2)->second.integer, 7);
  EXPECT_EQ(Decode(events[1].find(7)->second.bytes).find(1)->second.integer, 1);
}

TEST(TensorBoard, NotANumberIsWritten) {
  const TemporaryDirectory tmp;
  TensorBoardWriter writer(tmp.path());
  StepMetrics m = Example(1);
  m.loss = std::nan("");
  m.grad_norm = HUGE_VAL;
  writer.Write(m);
  const auto scalars = Scalars(ReadEvents(writer.path())[1]);
  EXPECT_TRUE(std::isnan(scalars.at("loss/train")));
  EXPECT_TRUE(std::isinf(scalars.at("optimizer/grad_norm")));
}

TEST(TensorBoard, NoPlaceToWrite) { EXPECT_THROW(TensorBoardWriter("/nonexistent"), Error); }

}  // namespace
}  // namespace shoal
