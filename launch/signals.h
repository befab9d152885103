// Requests that arrive as signals. One flag per signal: a launcher may follow one signal with
// another at once, or send the same one twice.
#pragma once

#include <string>

namespace shoal {

// A write beyond the limit on a file's size fails like one on a full disk, instead of ending us.
void ReportFileLimits();

// SIGUSR1 and SIGTERM: save and stop. SIGUSR2: save and go on.
void InstallSignalHandlers();
bool StopRequested();      // stays true
bool TakeSaveRequested();  // true once per SIGUSR2

// Requests that arrive as files of the run directory, for whoever cannot send a signal: `stop` and
// `save`. They are removed as they are seen.
enum class Request { kNone, kSave, kStop };
Request TakeRequestFile(const std::string& run);
// The same for `memory`: a report of the next step's.
bool TakeMemoryRequestFile(const std::string& run);

}  // namespace shoal
