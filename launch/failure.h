// How a failure is told: one block that says what happened, on which rank and host, what the last
// good save is, and the exact command that goes on from it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/base/error.h"

namespace shoal {

// How this program was started, and how far its run is. There is one per process: the block is
// printed where nobody holds the run any more.
struct FailureContext {
  std::string program = "shoal";  // as it was typed
  std::string launcher;           // "mpirun -n 4 ", or empty
  int ranks = 1;
  bool threads = false;   // the ranks are threads of this process
  std::string run;        // run directory, once it exists
  std::string last_save;  // path of the newest save that is whole
  int64_t step = 0;       // that is being computed
  std::string memory;     // what would take less of it, in whole lines
};

// A copy; safe from any thread.
FailureContext CurrentFailureContext();
// Changes the process's context under its lock: SetFailureContext([&](auto& c) { c.run = path; }).
void SetFailureContextWith(void (*change)(FailureContext&, const void*), const void* argument);
template <class F>
void SetFailureContext(const F& change) {
  SetFailureContextWith(
      [](FailureContext& context, const void* f) { (*static_cast<const F*>(f))(context); },
      &change);
}

// "mpirun -n 4 build/bin/shoal resume 'runs/my run'".
std::string ResumeCommand(const FailureContext& context);

// `text` as one word of a shell.
std::string ShellWord(std::string_view text);

// "configuration error", "data error", ...
std::string_view Describe(ErrorKind kind);

// The block, with a newline at its end.
std::string ErrorBlock(const Error& error, const FailureContext& context, std::string_view host,
                       bool color);

// Writes the block of the process's context to standard error, in one piece, and returns the exit
// code of the program. `host` is the rank's; empty: this one.
int PrintError(const Error& error, const std::string& host = "");

}  // namespace shoal
