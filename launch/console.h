// What a run prints. Rank 0 prints: on a terminal a bar that is drawn over itself, else one aligned
// line each. Every rank has a log file. Each output is one write, so lines never interleave.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "launch/metrics.h"

namespace shoal {

struct Terminal {
  bool interactive = false;  // a bar may be drawn
  bool color = false;
  int columns = 80;
};
// Not interactive under a launcher, whose pipes end who knows where; no color with NO_COLOR.
Terminal TerminalOf(int file);

class Console {
 public:
  Console(int rank, int ranks);
  // For tests: where to print, and what is known about it.
  Console(int rank, int ranks, int file, const Terminal& terminal);
  ~Console();
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  // From now on everything goes to this file too, with the time. Error(kStorage) if it cannot.
  void OpenLog(const std::string& path);

  void Info(std::string_view text);
  void Warn(std::string_view text);  // to standard error
  // The same from any rank and any thread: what may keep a run waiting.
  void Alert(std::string_view text) const;
  // Progress after a step: step 1 and the last, steps with a validation, and each `log_every`.
  void Step(const StepMetrics& metrics, int64_t steps, int64_t log_every);
  void EndProgress();  // takes the bar away

  // What an error block will name.
  void SetRun(const std::string& path);
  void SetLastSave(const std::string& path);

 private:
  class Log;

  void Print(std::string_view text);  // whole lines
  std::string StepLine(const StepMetrics& metrics, int64_t steps) const;
  void DrawBar(const StepMetrics& metrics, int64_t steps);
  double SecondsLeft(int64_t step, int64_t steps) const;

  const int rank_, ranks_, file_;
  const Terminal terminal_;
  std::unique_ptr<Log> log_;
  bool bar_drawn_ = false;
  std::chrono::steady_clock::time_point bar_time_{};
  std::chrono::steady_clock::time_point begin_{};
  int64_t first_step_ = 0;
  double first_seconds_ = 0;
  double last_validation_ = 0;
  bool validated_ = false;
};

// With --json, standard output belongs to the object: consoles then print to standard error.
void KeepStandardOutputForJson();

// In one piece.
void WriteToStandardError(std::string_view text);

// "1.25k", "16.4M": three digits and a unit of 1000.
std::string ShortNumber(double value);
// "512 MiB", "1.25 GiB": three digits and a unit of 1024.
std::string ShortBytes(double bytes);
// "0:42", "3:05:00", "2d 03:10".
std::string ShortDuration(double seconds);

}  // namespace shoal
