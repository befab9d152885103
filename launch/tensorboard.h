// Scalars as a TensorBoard event file: records of length, payload and masked CRC32C, payloads in
// protobuf's wire format, both written by hand.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "checkpoint/file_io.h"
#include "launch/metrics.h"

namespace shoal {

class TensorBoardWriter {
 public:
  // A new event file in `directory`; every start of a run has its own.
  explicit TensorBoardWriter(const std::string& directory, FullDisk full_disk = {});

  // Bytes by class and by axis are written where they changed. When the first step is not step 1,
  // TensorBoard is told to forget what earlier files have of it and of later steps.
  void Write(const StepMetrics& metrics);
  const std::string& path() const { return file_.path(); }

 private:
  void Append(std::string_view event);

  File file_;
  FullDisk full_disk_;
  bool started_ = false;
  std::map<std::string, int64_t> last_bytes_;
};

// CRC-32C (Castagnoli), as in RFC 3720, B.4.
uint32_t Crc32c(std::string_view data);

}  // namespace shoal
