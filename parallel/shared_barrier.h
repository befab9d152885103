// A barrier in memory that several threads or processes share.
#pragma once

#include <atomic>

namespace shoal {

// Lives in zeroed memory; all of it is lock-free.
struct SharedBarrier {
  std::atomic<int> arrived;
  std::atomic<int> generation;
  std::atomic<int> aborted;  // 1 + the rank that failed, 0 while none has

  // Waits for `ranks` callers; throws PeerFailed once one has aborted.
  void Wait(int ranks);
};
static_assert(std::atomic<int>::is_always_lock_free);

}  // namespace shoal
