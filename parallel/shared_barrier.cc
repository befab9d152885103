#include "parallel/shared_barrier.h"

#include <sched.h>
#include <time.h>

#include "parallel/communicator.h"

namespace shoal {

void SharedBarrier::Wait(int ranks, bool abortable) {
  constexpr uint64_t kGeneration = uint64_t{1} << 32;
  const auto all = static_cast<uint64_t>(ranks);
  uint64_t seen = state.load(std::memory_order_acquire);
  uint64_t next = 0;
  do {
    const uint64_t arrived = seen % kGeneration + 1;
    next = arrived == all ? (seen / kGeneration + 1) * kGeneration : seen + 1;
  } while (!state.compare_exchange_weak(seen, next, std::memory_order_acq_rel));
  const uint64_t mine = seen / kGeneration;
  if (next / kGeneration != mine) return;
  for (int tries = 0;; ++tries) {
    uint64_t now = state.load(std::memory_order_acquire);
    if (now / kGeneration != mine) return;
    const int failed = abortable ? aborted.load(std::memory_order_acquire) : 0;
    if (failed != 0) {
      // Taken back, so that those who come later do not pass on the strength of it.
      while (now / kGeneration == mine) {
        if (state.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel))
          throw PeerFailed{failed - 1};
      }
      return;
    }
    Pause(tries);
  }
}

void SharedBarrier::ThrowIfAborted() {
  const int failed = aborted.load(std::memory_order_acquire);
  if (failed != 0) throw PeerFailed{failed - 1};
}

void SharedBarrier::Pause(int tries) {
  constexpr int kSpins = 2000, kYields = 20000;
  if (tries >= kYields) {
    const timespec pause = {0, 50000};
    nanosleep(&pause, nullptr);
  } else if (tries >= kSpins) {
    sched_yield();
  }
}

}  // namespace shoal
