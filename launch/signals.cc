#include "launch/signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace shoal {
namespace {
std::atomic<bool> stop = false;
std::atomic<bool> save = false;
static_assert(std::atomic<bool>::is_always_lock_free);

void OnStop(int) { stop.store(true); }
void OnSave(int) { save.store(true); }

// One that cannot be removed would come again with every step: it counts once.
bool Take(const std::string& path, std::atomic<bool>& kept) {
  if (access(path.c_str(), F_OK) != 0) {
    kept = false;
    return false;
  }
  const bool again = kept.load();
  kept = unlink(path.c_str()) != 0;
  return !again;
}
std::atomic<bool> stop_kept = false, save_kept = false, memory_kept = false;

}  // namespace

void ReportFileLimits() { signal(SIGXFSZ, SIG_IGN); }

void InstallSignalHandlers() {
  struct sigaction action = {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;  // file and MPI calls go on
  action.sa_handler = OnStop;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = OnSave;
  sigaction(SIGUSR2, &action, nullptr);
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);  // a run goes on where nobody reads what it prints
}

bool StopRequested() { return stop.load(); }
bool TakeSaveRequested() { return save.exchange(false); }

Request TakeRequestFile(const std::string& run) {
  const bool stop_asked = Take(run + "/stop", stop_kept);
  const bool save_asked = Take(run + "/save", save_kept);
  return stop_asked ? Request::kStop : save_asked ? Request::kSave : Request::kNone;
}

bool TakeMemoryRequestFile(const std::string& run) { return Take(run + "/memory", memory_kept); }

}  // namespace shoal
