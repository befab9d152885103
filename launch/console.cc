#include "launch/console.h"

#include <fmt/format.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "core/base/error.h"
#include "launch/bootstrap.h"
#include "launch/failure.h"

namespace shoal {
namespace {

using std::chrono::steady_clock;

constexpr const char* kDim = "\x1b[2m";
constexpr const char* kBold = "\x1b[1m";
constexpr const char* kYellow = "\x1b[33m";
constexpr const char* kReset = "\x1b[0m";
constexpr const char* kClearLine = "\r\x1b[K";

std::atomic<bool> json_on_standard_output = false;

void WriteAll(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = write(file, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nobody reads: no reason to end a run
    text.remove_prefix(static_cast<size_t>(n));
  }
}

// Three significant digits: 1.23, 12.3, 123.
std::string ThreeDigits(double value) {
  return fmt::format("{:.{}f}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

std::string WithUnit(double value, double step, const char* const* units, int count) {
  int unit = 0;
  while (unit + 1 < count && std::abs(value) >= step * 0.9995) {
    value /= step;
    ++unit;
  }
  const bool whole = unit == 0 && value == std::floor(value);
  return (whole ? fmt::format("{:.0f}", value) : ThreeDigits(value)) + units[unit];
}

}  // namespace

std::string ShortNumber(double value) {
  static constexpr const char* kUnits[] = {"", "k", "M", "G", "T"};
  if (!std::isfinite(value)) return fmt::format("{}", value);
  return WithUnit(value, 1000, kUnits, 5);
}

std::string ShortBytes(double bytes) {
  static constexpr const char* kUnits[] = {" B", " KiB", " MiB", " GiB", " TiB"};
  return WithUnit(bytes, 1024, kUnits, 5);
}

std::string ShortDuration(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "?";
  const int64_t s = std::llround(seconds);
  if (s >= 86400) return fmt::format("{}d {:02}:{:02}", s / 86400, s / 3600 % 24, s / 60 % 60);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

Terminal TerminalOf(int file) {
  Terminal terminal;
  const char* term = std::getenv("TERM");
  const bool dumb = term == nullptr || std::string_view(term) == "dumb";
  if (!isatty(file) || dumb || DetectLauncher().present) return terminal;
  terminal.interactive = true;
  const char* no_color = std::getenv("NO_COLOR");
  terminal.color = no_color == nullptr || *no_color == '\0';
  winsize size{};
  if (ioctl(file, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) terminal.columns = size.ws_col;
  return terminal;
}

void KeepStandardOutputForJson() { json_on_standard_output = true; }

void WriteToStandardError(std::string_view text) { WriteAll(STDERR_FILENO, text); }

// spdlog adds the time and buffers nothing longer than a line.
class Console::Log {
 public:
  explicit Log(const std::string& path) {
    try {
      logger_ = std::make_shared<spdlog::logger>(
          path, std::make_shared<spdlog::sinks::basic_file_sink_mt>(path, /*truncate=*/false));
    } catch (const spdlog::spdlog_ex& e) {
      SHOAL_FAIL(ErrorKind::kStorage, "log", "cannot write {}: {}", path, e.what());
    }
    logger_->set_pattern("%Y-%m-%d %H:%M:%S.%e %L %v");
    logger_->flush_on(spdlog::level::info);
    logger_->set_error_handler([](const std::string&) {});  // a full disk ends no run by its log
  }
  void Write(spdlog::level::level_enum level, std::string_view text) {
    logger_->log(level, spdlog::string_view_t(text.data(), text.size()));
  }

 private:
  std::shared_ptr<spdlog::logger> logger_;
};

Console::Console(int rank, int ranks)
    : Console(rank, ranks, json_on_standard_output ? STDERR_FILENO : STDOUT_FILENO,
              TerminalOf(json_on_standard_output ? STDERR_FILENO : STDOUT_FILENO)) {}

Console::Console(int rank, int ranks, int file, const Terminal& terminal)
    : rank_(rank), ranks_(ranks), file_(file), terminal_(terminal) {}

Console::~Console() { EndProgress(); }

void Console::OpenLog(const std::string& path) {
  log_ = std::make_unique<Log>(path);
  log_->Write(spdlog::level::info,
              fmt::format("rank {} of {}, process {}", rank_, ranks_, getpid()));
}

void Console::Print(std::string_view text) {
  if (rank_ != 0) return;
  WriteAll(file_, fmt::format("{}{}\n", bar_drawn_ ? kClearLine : "", text));
  bar_drawn_ = false;
}

void Console::Info(std::string_view text) {
  if (log_) log_->Write(spdlog::level::info, text);
  Print(text);
}

void Console::Warn(std::string_view text) {
  if (log_) log_->Write(spdlog::level::warn, text);
  if (rank_ != 0) return;
  EndProgress();
  const Terminal terminal = TerminalOf(STDERR_FILENO);
  WriteToStandardError(fmt::format("{}shoal: {}{}\n", terminal.color ? kYellow : "", text,
                                   terminal.color ? kReset : ""));
}

void Console::Alert(std::string_view text) const {
  if (log_) log_->Write(spdlog::level::warn, text);
  const Terminal terminal = TerminalOf(STDERR_FILENO);
  WriteToStandardError(fmt::format("{}{}shoal: {}{}\n", terminal.interactive ? kClearLine : "",
                                   terminal.color ? kYellow : "", text,
                                   terminal.color ? kReset : ""));
}

double Console::SecondsLeft(int64_t step, int64_t steps) const {
  // The first step is slow (memory is touched, kernels are made), so it counts once and not for
  // all.
  const double elapsed = std::chrono::duration<double>(steady_clock::now() - begin_).count();
  const int64_t done = step - first_step_;
  const double each = done > 0 ? elapsed / static_cast<double>(done) : first_seconds_;
  return each * static_cast<double>(steps - step);
}

std::string Console::StepLine(const StepMetrics& m, int64_t steps) const {
  const int width = static_cast<int>(fmt::formatted_size("{}", steps));
  std::string line = fmt::format(
      "step {:>{}}/{}  loss {:<8.4f}  norm {:<8.3g}  lr {:.2e}  {:>6} tok/s  {:>8}", m.step, width,
      steps, m.loss, m.grad_norm, m.lr, ShortNumber(m.tokens_per_second),
      ShortBytes(m.peak_bytes.empty() ? 0 : static_cast<double>(m.peak_bytes.back().second)));
  line += fmt::format("  {:>7} left", ShortDuration(SecondsLeft(m.step, steps)));
  if (m.validation_loss) line += fmt::format("  validation {:.4f}", *m.validation_loss);
  return line;
}

void Console::DrawBar(const StepMetrics& m, int64_t steps) {
  std::string text = fmt::format(" {}/{}  loss {:.4f}", m.step, steps, m.loss);
  if (validated_) text += fmt::format("  val {:.4f}", last_validation_);
  text += fmt::format("  {} tok/s", ShortNumber(m.tokens_per_second));
  text += fmt::format("  {} left", ShortDuration(SecondsLeft(m.step, steps)));
  const int room = terminal_.columns - static_cast<int>(text.size()) - 3;
  std::string bar;
  if (room >= 8) {
    const int cells = std::min(room, 40);
    const int full = static_cast<int>(static_cast<double>(cells) * static_cast<double>(m.step) /
                                      static_cast<double>(steps));
    bar = fmt::format("[{}{}{}{}{}]", terminal_.color ? kBold : "", std::string(full, '='),
                      terminal_.color ? kDim : "", std::string(cells - full, '.'),
                      terminal_.color ? kReset : "");
  } else if (static_cast<int>(text.size()) >= terminal_.columns) {
    text.resize(static_cast<size_t>(std::max(1, terminal_.columns - 1)));  // a wrapped line stays
  }
  WriteAll(file_, kClearLine + bar + text);
  bar_drawn_ = true;
}

void Console::Step(const StepMetrics& m, int64_t steps, int64_t log_every) {
  const auto now = steady_clock::now();
  if (first_step_ == 0) {
    first_step_ = m.step;
    first_seconds_ = m.seconds;
    begin_ = now;
  }
  if (m.validation_loss) {
    validated_ = true;
    last_validation_ = *m.validation_loss;
  }
  const bool due = m.step == first_step_ || m.step == steps || m.validation_loss ||
                   m.step % log_every == 0 || !std::isfinite(m.loss);
  std::string line;
  if (due) line = StepLine(m, steps);
  if (due && log_) log_->Write(spdlog::level::info, line);
  if (rank_ != 0) return;
  if (!terminal_.interactive) {
    if (due) Print(line);
    return;
  }
  // On a terminal the bar shows every step; only what one wants to look back at stays.
  if (m.validation_loss || !std::isfinite(m.loss)) Print(line);
  if (bar_drawn_ && m.step < steps && now - bar_time_ < std::chrono::milliseconds(100)) return;
  bar_time_ = now;
  DrawBar(m, steps);
}

void Console::EndProgress() {
  if (!bar_drawn_) return;
  WriteAll(file_, kClearLine);
  bar_drawn_ = false;
}

void Console::SetRun(const std::string& path) {
  SetFailureContext([&](FailureContext& context) { context.run = path; });
}

void Console::SetLastSave(const std::string& path) {
  if (log_ && !path.empty()) log_->Write(spdlog::level::info, "saved " + path);
  SetFailureContext([&](FailureContext& context) {
    context.last_save = path;
    // RUN/checkpoints/step-N
    if (context.run.empty() && !path.empty())
      context.run = std::filesystem::path(path).parent_path().parent_path().string();
  });
}

}  // namespace shoal
