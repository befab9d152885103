#include "launch/failure.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <mutex>

#include "launch/console.h"

namespace shoal {
namespace {

std::mutex context_mutex;
FailureContext context_of_process;

}  // namespace

FailureContext CurrentFailureContext() {
  const std::lock_guard lock(context_mutex);
  return context_of_process;
}

void SetFailureContextWith(void (*change)(FailureContext&, const void*), const void* argument) {
  const std::lock_guard lock(context_mutex);
  change(context_of_process, argument);
}

std::string ShellWord(std::string_view text) {
  const auto plain = [](unsigned char c) {
    return std::isalnum(c) ||
           std::string_view("_-./=+:,@%").find(static_cast<char>(c)) != std::string_view::npos;
  };
  if (!text.empty() && std::ranges::all_of(text, plain)) return std::string(text);
  std::string word = "'";
  for (const char c : text) word += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return word + "'";
}

std::string ResumeCommand(const FailureContext& c) {
  return fmt::format("{}{} resume {}{}", c.launcher, ShellWord(c.program), ShellWord(c.run),
                     c.threads && c.ranks > 1 ? fmt::format(" --local-ranks {}", c.ranks) : "");
}

std::string_view Describe(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kConfig:
      return "configuration error";
    case ErrorKind::kBug:
      return "bug in Shoal";
    case ErrorKind::kHang:
      return "a rank stopped answering";
    case ErrorKind::kData:
      return "data error";
    case ErrorKind::kStorage:
      return "storage error";
    case ErrorKind::kRequeue:
      return "stopped";
    case ErrorKind::kMemory:
      return "out of memory";
  }
  return "error";
}

namespace {

// Indented, to the last newline.
void Add(std::string_view text, std::string* block) {
  while (!text.empty()) {
    const size_t end = text.find('\n');
    *block += fmt::format("  {}\n", text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
}

}  // namespace

std::string ErrorBlock(const Error& error, const FailureContext& c, std::string_view host,
                       bool color) {
  std::string where;
  if (c.ranks > 1)
    where = fmt::format(", rank {} of {} on {}", error.rank(), c.ranks, host);
  else if (!c.run.empty())
    where = fmt::format(", on {}", host);
  std::string block = fmt::format("{}shoal: {}{} (exit code {}){}\n", color ? "\x1b[1;31m" : "",
                                  Describe(error.kind()), where, static_cast<int>(error.kind()),
                                  color ? "\x1b[0m" : "");
  // A bug's text names the op and our source line.
  std::string_view text = error.message();
  if (error.kind() == ErrorKind::kBug) text = error.what();
  Add(text, &block);
  if (error.kind() == ErrorKind::kMemory && !c.memory.empty()) Add(c.memory, &block);
  if (c.run.empty()) return block;
  if (c.last_save.empty()) {
    block +=
        fmt::format("  Last good save: none yet in {}. Start again under another run.dir\n", c.run);
  } else {
    block += fmt::format("  Last good save: {}\n", c.last_save);
    block += fmt::format("  To go on:       {}\n", ResumeCommand(c));
  }
  return block;
}

int PrintError(const Error& error, const std::string& host) {
  char here[256] = "this host";
  gethostname(here, sizeof(here) - 1);
  WriteToStandardError(ErrorBlock(error, CurrentFailureContext(), host.empty() ? here : host,
                                  TerminalOf(STDERR_FILENO).color));
  return static_cast<int>(error.kind());
}

}  // namespace shoal
