#include "launch/signals.h"

#include <signal.h>

#include <atomic>

namespace shoal {
namespace {
std::atomic<bool> stop = false;
std::atomic<bool> save = false;
static_assert(std::atomic<bool>::is_always_lock_free);

void OnStop(int) { stop.store(true); }
void OnSave(int) { save.store(true); }
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

}  // namespace shoal
