// Collectives behind computation: a thread of this rank runs them in the order in which they were
// posted. Ranks post the same work in the same order.
#pragma once

#include <functional>
#include <memory>
#include <thread>

#include "parallel/communicator.h"

namespace shoal {

// Error(kConfig) of `op` if no second thread may send; `why` is who needs one, `key` the degree to
// set to 1.
void CheckConcurrent(const Communicator& communicator, const char* op, const char* why,
                     const char* key);

class CommQueue {
 public:
  // For work over groups of `communicator`'s ranks that are used by nothing else meanwhile.
  explicit CommQueue(const Communicator& communicator);
  ~CommQueue();  // waits for what was posted
  CommQueue(const CommQueue&) = delete;
  CommQueue& operator=(const CommQueue&) = delete;

  using Ticket = uint64_t;
  // What `work` touches is its own until Wait. Runs at once where there is nothing to gain (one
  // rank, meta) or no second thread allowed.
  Ticket Post(std::function<void()> work);
  // Until that work, and so all that was posted before it, is done. Throws what it threw; after an
  // error the rest of the queue is dropped.
  void Wait(Ticket ticket);
  void WaitAll() { Wait(posted_); }
  // After a failure, when what was posted may never end: nobody waits for it any more. What it uses
  // must be its own.
  void Abandon();

  // Time that Wait spends goes to `profile` (may be null) from now on.
  void set_profile(KernelProfile* profile) { profile_ = profile; }

 private:
  struct State;
  std::shared_ptr<State> state_;  // the thread's too
  KernelProfile* profile_ = nullptr;
  Ticket posted_ = 0;  // by the owner alone
  std::thread thread_;
};

}  // namespace shoal
