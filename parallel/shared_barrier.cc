#include "parallel/shared_barrier.h"

#include <sched.h>
#include <time.h>

#include "parallel/communicator.h"

namespace shoal {

void SharedBarrier::Wait(int ranks) {
  const int mine = generation.load(std::memory_order_acquire);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == ranks) {
    arrived.store(0, std::memory_order_relaxed);
    generation.store(mine + 1, std::memory_order_release);
    return;
  }
  // Ranks may outnumber cores: after a short spin the core is given away, and after a while slept
  // on.
  constexpr int kSpins = 2000, kYields = 20000;
  for (int tries = 0; generation.load(std::memory_order_acquire) == mine; ++tries) {
    if (const int failed = aborted.load(std::memory_order_acquire)) throw PeerFailed{failed - 1};
    if (tries >= kYields) {
      const timespec pause = {0, 50000};
      nanosleep(&pause, nullptr);
    } else if (tries >= kSpins) {
      sched_yield();
    }
  }
}

}  // namespace shoal
