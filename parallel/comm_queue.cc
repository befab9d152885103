#include "parallel/comm_queue.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>

#include "core/base/build_config.h"
#include "core/base/error.h"
#include "core/context.h"
#include "kernels/cuda_runtime.h"

namespace shoal {

struct CommQueue::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> work;
  Ticket done = 0;
  bool stop = false;
  std::exception_ptr error;

  void Serve();
};

void CheckConcurrent(const Communicator& communicator, const char* op, const char* why,
                     const char* key) {
  if (communicator.size() > 1 && !communicator.concurrent())
    SHOAL_FAIL(
        ErrorKind::kConfig, op,
        "the MPI library lets one thread call it at a time (no MPI_THREAD_MULTIPLE), and {}: "
        "set {} to 1, or start with --local-ranks",
        why, key);
}

CommQueue::CommQueue(const Communicator& communicator) : state_(std::make_shared<State>()) {
  const bool meta = ExecutionContext::Current().device().type == DeviceType::kMeta;
  if (communicator.size() == 1 || meta || !communicator.concurrent()) return;
  thread_ = std::thread([state = state_, rank = ThreadRank()] {
    SetThreadRank(rank);
    state->Serve();
  });
}

CommQueue::~CommQueue() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->changed.notify_all();
  thread_.join();
}

CommQueue::Ticket CommQueue::Post(std::function<void()> work) {
  ++posted_;
  if (!thread_.joinable()) {
    work();
    return posted_;
  }
  if constexpr (kHaveCuda) {
    // The kernels before it are queued, and may not have run.
    const Stream& stream = ExecutionContext::Current().stream();
    if (stream.device.type == DeviceType::kCuda)
      work = [mark = cuda::Mark(stream.handle), work = std::move(work)] {
        cuda::WaitFor(mark);
        work();
      };
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->work.push_back(std::move(work));
  }
  state_->changed.notify_all();
  return posted_;
}

void CommQueue::Wait(Ticket ticket) {
  if (!thread_.joinable()) return;
  const KernelTimer timer(profile_, "Communication");
  std::unique_lock lock(state_->mutex);
  state_->changed.wait(lock, [&] { return state_->done >= ticket || state_->error != nullptr; });
  if (state_->error != nullptr) std::rethrow_exception(state_->error);
}

void CommQueue::Abandon() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
    state_->work.clear();
  }
  state_->changed.notify_all();
  thread_.detach();
}

void CommQueue::State::Serve() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [&] { return stop || !work.empty(); });
    if (work.empty()) return;
    std::function<void()> next = std::move(work.front());
    work.pop_front();
    lock.unlock();
    std::exception_ptr failed;
    try {
      next();
    } catch (...) {
      failed = std::current_exception();
    }
    next = nullptr;  // what it held is free before its end is told
    lock.lock();
    if (failed != nullptr) {
      error = failed;
      work.clear();
    } else {
      ++done;
    }
    changed.notify_all();
    if (error != nullptr) return;
  }
}

}  // namespace shoal
