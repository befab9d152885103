#include "parallel/comm_queue.h"

#include "core/base/error.h"
#include "core/context.h"

namespace shoal {

CommQueue::CommQueue(const Communicator& communicator) {
  const bool meta = ExecutionContext::Current().device().type == DeviceType::kMeta;
  if (communicator.size() == 1 || meta || !communicator.concurrent()) return;
  thread_ = std::thread([this, rank = ThreadRank()] {
    SetThreadRank(rank);
    Serve();
  });
}

CommQueue::~CommQueue() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

CommQueue::Ticket CommQueue::Post(std::function<void()> work) {
  ++posted_;
  if (!thread_.joinable()) {
    work();
    return posted_;
  }
  {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
  }
  changed_.notify_all();
  return posted_;
}

void CommQueue::Wait(Ticket ticket) {
  if (!thread_.joinable()) return;
  const KernelTimer timer(profile_, "Communication");
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= ticket || error_ != nullptr; });
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void CommQueue::Serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !work_.empty(); });
    if (work_.empty()) return;
    const std::function<void()> work = std::move(work_.front());
    work_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      work();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error != nullptr) {
      error_ = error;
      work_.clear();
    } else {
      ++done_;
    }
    changed_.notify_all();
    if (error_ != nullptr) return;
  }
}

}  // namespace shoal
