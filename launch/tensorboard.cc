#include "launch/tensorboard.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <utility>

namespace shoal {
namespace {

// Protobuf: a field is a varint (number << 3 | wire type) and its value.
enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

void PutVarint(std::string* out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void PutTag(std::string* out, uint32_t field, WireType type) { PutVarint(out, field << 3 | type); }

// Little-endian, whatever the machine is.
template <class T>
void PutFixed(std::string* out, T bits) {
  for (size_t i = 0; i < sizeof(T); ++i) out->push_back(static_cast<char>(bits >> (8 * i)));
}

void PutBytes(std::string* out, uint32_t field, std::string_view bytes) {
  PutTag(out, field, kLengthDelimited);
  PutVarint(out, bytes.size());
  out->append(bytes);
}

// Event: wall_time 1, step 2; the caller adds file_version 3, summary 5 or session_log 7.
std::string Event(int64_t step) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string event;
  PutTag(&event, 1, kFixed64);
  PutFixed(&event, std::bit_cast<uint64_t>(now.count()));
  PutTag(&event, 2, kVarint);
  PutVarint(&event, static_cast<uint64_t>(step));
  return event;
}

// Summary.value 1 of {tag 1, simple_value 2}.
void PutScalar(std::string* summary, std::string_view tag, double value) {
  std::string entry;
  PutBytes(&entry, 1, tag);
  PutTag(&entry, 2, kFixed32);
  PutFixed(&entry, std::bit_cast<uint32_t>(static_cast<float>(value)));
  PutBytes(summary, 1, entry);
}

constexpr std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
    table[i] = c;
  }
  return table;
}

// TFRecord's mask, so that a CRC of data that holds CRCs is not weak.
uint32_t MaskedCrc(std::string_view data) { return std::rotr(Crc32c(data), 15) + 0xa282ead8u; }

// TensorBoard reads a run's files in the order of their names, which is that of time. Two starts
// within a second, of one process, differ by the last number.
std::string EventPath(const std::string& directory) {
  char host[256] = "host";
  gethostname(host, sizeof(host) - 1);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
  for (int n = 0;; ++n) {
    std::string path = fmt::format("{}/events.out.tfevents.{:010}.{}.{}.{}", directory, seconds,
                                   host, getpid(), n);
    if (!std::filesystem::exists(path)) return path;
  }
}

}  // namespace

uint32_t Crc32c(std::string_view data) {
  static constexpr std::array<uint32_t, 256> kTable = MakeCrcTable();
  uint32_t c = ~0u;
  for (const char byte : data) c = kTable[(c ^ static_cast<unsigned char>(byte)) & 255] ^ c >> 8;
  return ~c;
}

TensorBoardWriter::TensorBoardWriter(const std::string& directory, FullDisk full_disk)
    : file_(File::Create(EventPath(directory))), full_disk_(std::move(full_disk)) {
  std::string event = Event(0);
  PutBytes(&event, 3, "brain.Event:2");
  Append(event);
}

void TensorBoardWriter::Append(std::string_view event) {
  std::string record;
  PutFixed(&record, uint64_t{event.size()});
  PutFixed(&record, MaskedCrc(record));
  record.append(event);
  PutFixed(&record, MaskedCrc(event));
  file_.Append(record.data(), std::ssize(record), full_disk_);
}

void TensorBoardWriter::Write(const StepMetrics& m) {
  if (!started_ && m.step > 1) {
    std::string start = Event(m.step);
    PutBytes(&start, 7, std::string_view("\x08\x01", 2));  // session_log {status 1: START}
    Append(start);
  }
  started_ = true;

  std::string summary;
  PutScalar(&summary, "loss/train", m.loss);
  if (m.validation_loss) PutScalar(&summary, "loss/validation", *m.validation_loss);
  PutScalar(&summary, "optimizer/grad_norm", m.grad_norm);
  PutScalar(&summary, "optimizer/lr", m.lr);
  PutScalar(&summary, "speed/tokens_per_second", m.tokens_per_second);
  PutScalar(&summary, "speed/host_gap_seconds", m.host_gap_seconds);
  const auto changed = [&](const char* group, const NamedBytes& values) {
    for (const auto& [name, bytes] : values) {
      const std::string tag = fmt::format("{}/{}", group, name);
      const auto [last, first] = last_bytes_.try_emplace(tag, bytes);
      if (!first && last->second == bytes) continue;
      last->second = bytes;
      PutScalar(&summary, tag, static_cast<double>(bytes));
    }
  };
  changed("peak_bytes", m.peak_bytes);
  changed("wire_bytes", m.wire_bytes);

  std::string event = Event(m.step);
  PutBytes(&event, 5, summary);
  Append(event);
}

}  // namespace shoal
