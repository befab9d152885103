// A barrier in memory that several threads or processes share.
#pragma once

#include <atomic>
#include <cstdint>

namespace shoal {

// Lives in zeroed memory; all of it is lock-free.
struct SharedBarrier {
  // Generation in the upper half, arrived callers in the lower: one word, so that a caller who
  // gives up and the last one to arrive agree on whether the barrier was passed.
  std::atomic<uint64_t> state;
  std::atomic<int> aborted;  // 1 + the rank that failed, 0 while none has

  // Waits for `ranks` callers; throws PeerFailed once one has aborted. Either all callers pass or
  // none does.
  void Wait(int ranks) { Wait(ranks, true); }
  // For the end of a collective, at which all who began it arrive: nobody may leave, by whatever
  // way, while another still reads his buffers. Does not throw.
  void WaitForAll(int ranks) { Wait(ranks, false); }
  // Until `done()`, which another caller brings about; throws PeerFailed like Wait.
  template <class F>
  void WaitUntil(F&& done) {
    for (int tries = 0; !done(); ++tries) {
      ThrowIfAborted();
      Pause(tries);
    }
  }
  // The same for what is sure to come about soon. Does not throw.
  template <class F>
  static void SpinUntil(F&& done) {
    for (int tries = 0; !done(); ++tries) Pause(tries);
  }

 private:
  void Wait(int ranks, bool abortable);
  void ThrowIfAborted();
  // Ranks may outnumber cores: after a short spin the core is given away, and after a while slept
  // on.
  static void Pause(int tries);
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

}  // namespace shoal
