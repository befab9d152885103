// metrics.jsonl: a line per optimizer step, written by rank 0. The keys are the contract of the
// program (docs/design.md, section 5). Floats read back exactly. JSON has no NaN or infinity: they
// are the strings "NaN", "Infinity" and "-Infinity", which Python's float() and JavaScript's
// Number() understand.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/file_io.h"

namespace shoal {

// In the order in which they are written.
using NamedBytes = std::vector<std::pair<std::string, int64_t>>;

struct StepMetrics {
  int64_t step = 0;      // from 1
  double loss = 0;       // mean over the step's global tokens, before the update
  double grad_norm = 0;  // global, before clipping
  double lr = 0;         // of this step's update
  int64_t tokens = 0;    // of the run so far
  double seconds = 0;    // of this step
  double tokens_per_second = 0;
  NamedBytes peak_bytes;  // this rank's, by class and "peak"
  NamedBytes wire_bytes;  // sent by this rank in this step, by mesh axis and "control"
  double host_gap_seconds = 0;
  std::optional<double> validation_loss;  // after the update, where it was measured
  bool skipped = false;                   // nothing was updated, as the loss or norm was not finite

  bool operator==(const StepMetrics&) const = default;
};

// One line, without its end.
std::string ToJsonLine(const StepMetrics& metrics);
// Nothing if the text is not a whole line of metrics. Keys that it does not know are passed over.
std::optional<StepMetrics> ParseMetrics(std::string_view line);

class MetricsWriter {
 public:
  explicit MetricsWriter(const std::string& path, FullDisk full_disk = {});  // appends
  // Each line is one write: a reader sees whole lines, and a killed process tears at most the last.
  void Write(const StepMetrics& metrics);
  void Sync();  // with every checkpoint

 private:
  File file_;
  FullDisk full_disk_;
};

struct MetricsFile {
  std::vector<StepMetrics> steps;
  int64_t skipped_lines = 0;  // torn, or not metrics
};
// A file that is missing is one without lines.
MetricsFile ReadMetrics(const std::string& path);

// Keeps the lines of steps 1 ... `step` and drops torn, later and repeated ones, all or nothing.
// Returns the number of lines dropped.
int64_t CutMetrics(const std::string& path, int64_t step);

// The shortest digits that read back to the same double, as JSON and TOML write a number that is
// not an integer: 0.1, 1.0, 1e-08. Finite values only.
std::string ExactFloat(double value);

}  // namespace shoal
