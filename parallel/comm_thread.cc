// Ranks as threads of one process. Arrays are read in place, for all ranks share all memory.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/base/thread_count.h"
#include "core/context.h"
#include "parallel/communicator.h"
#include "parallel/direct.h"
#include "parallel/shared_barrier.h"

namespace shoal {
namespace {

class Family;

// What one rank brought to the collective in progress.
struct Offer {
  std::span<const View> pieces;
  std::span<const int64_t> bounds;  // or counts
};

// One message on its way: null again once it has been read.
struct Mailbox {
  std::atomic<const View*> message = nullptr;
};

struct Group {
  Group(Family& all, int ranks)
      : family(all),
        size(ranks),
        offers(static_cast<size_t>(ranks)),
        strings(static_cast<size_t>(ranks)),
        subgroups(static_cast<size_t>(ranks)),
        mailboxes(static_cast<size_t>(ranks) * static_cast<size_t>(ranks)) {}

  Family& family;
  int size;
  SharedBarrier barrier = {};
  std::vector<Offer> offers;
  std::vector<std::string> strings;
  std::vector<std::shared_ptr<Group>> subgroups;  // being handed out, by their first member
  std::vector<Mailbox> mailboxes;                 // from, to
};

// All groups of a run: a rank's failure ends the waiting in each.
class Family {
 public:
  std::shared_ptr<Group> Make(int ranks) {
    auto group = std::make_shared<Group>(*this, ranks);
    const std::lock_guard lock(mutex_);
    group->barrier.aborted = failed_;
    groups_.push_back(group);
    return group;
  }
  void Abort(int rank) {
    const std::lock_guard lock(mutex_);
    if (failed_ == 0) failed_ = rank + 1;
    for (const auto& weak : groups_) {
      if (const auto group = weak.lock()) group->barrier.aborted = failed_;
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<Group>> groups_;
  int failed_ = 0;
};

class ThreadCommunicator : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Group> group, int rank, int world_rank)
      : group_(std::move(group)), rank_(rank), world_rank_(world_rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_->size; }
  std::string host() const override { return MakeSelfCommunicator()->host(); }
  void Barrier() override { group_->barrier.Wait(group_->size); }
  void Abort(int) override { group_->family.Abort(world_rank_); }

  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    const auto mine = std::find(members.begin(), members.end(), rank_) - members.begin();
    SHOAL_CHECK(mine < static_cast<std::ptrdiff_t>(members.size()), "subgroup",
                "rank {} asks for a group that it is not in", rank_);
    // The first member makes it and puts it where the others find it.
    std::shared_ptr<Group>& own = group_->subgroups[static_cast<size_t>(rank_)];
    if (mine == 0) own = group_->family.Make(static_cast<int>(members.size()));
    Barrier();
    std::shared_ptr<Group> group = group_->subgroups[static_cast<size_t>(members[0])];
    group_->barrier.WaitForAll(group_->size);
    own = nullptr;
    SHOAL_CHECK(group != nullptr && group->size == static_cast<int>(members.size()), "subgroup",
                "the ranks disagree on who is in the group of rank {}", members[0]);
    return std::make_unique<ThreadCommunicator>(std::move(group), static_cast<int>(mine),
                                                world_rank_);
  }

 protected:
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    Together("all-reduce", {pieces, {}}, [&] {
      DirectArrays{pieces, Arrays(), rank_}.AllReduce(op);
    });
  }

  void DoReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                       char* into) override {
    Together("reduce-scatter", {pieces, bounds}, [&] {
      DirectArrays{pieces, Arrays(), rank_}.ReduceScatter(bounds, into);
    });
  }

  void DoAllGather(std::span<const View> pieces, std::span<const int64_t> bounds) override {
    Together("all-gather", {pieces, bounds}, [&] {
      DirectArrays{pieces, Arrays(), rank_}.AllGather(bounds);
    });
  }

  void DoAllToAll(const View& send, std::span<const int64_t> send_counts, const View& receive,
                  std::span<const int64_t> receive_counts) override {
    Of(rank_) = {std::span(&send, 1), send_counts};
    Barrier();
    bool alike = true;
    char* to = receive.as<char>();
    for (int r = 0; r < size(); ++r) {
      const View& from = Of(r).pieces[0];
      const std::span<const int64_t> counts = Of(r).bounds;
      const int64_t count = receive_counts[static_cast<size_t>(r)];
      alike = alike && from.dtype == send.dtype && counts[static_cast<size_t>(rank_)] == count;
      if (!alike) break;
      int64_t first = 0;
      for (int before = 0; before < rank_; ++before) first += counts[static_cast<size_t>(before)];
      const size_t bytes = static_cast<size_t>(count) * SizeOf(send.dtype);
      if (bytes > 0)
        std::memcpy(to, from.as<char>() + static_cast<size_t>(first) * SizeOf(send.dtype), bytes);
      to += bytes;
    }
    group_->barrier.WaitForAll(size());
    SHOAL_CHECK(alike, "all-to-all", "the ranks brought different counts or dtypes");
  }

  void DoBroadcast(const View& data, int root) override {
    Together("broadcast", {std::span(&data, 1), {}}, [&] {
      if (rank_ != root) std::memcpy(data.data, Of(root).pieces[0].data, data.bytes());
    });
  }

  void DoSend(const View& data, int to) override {
    std::atomic<const View*>& message = Box(rank_, to);
    message.store(&data, std::memory_order_release);
    const auto taken = [&] { return message.load(std::memory_order_acquire) == nullptr; };
    try {
      group_->barrier.WaitUntil(taken);
    } catch (const PeerFailed&) {
      // Taken back, unless the other is reading it just now.
      const View* mine = &data;
      if (message.compare_exchange_strong(mine, nullptr)) throw;
      group_->barrier.SpinUntil(taken);
    }
  }

  void DoReceive(const View& data, int from) override {
    static const View kReading;
    std::atomic<const View*>& message = Box(from, rank_);
    const View* sent = nullptr;
    group_->barrier.WaitUntil([&] {
      sent = message.load(std::memory_order_acquire);
      return sent != nullptr && message.compare_exchange_strong(sent, &kReading);
    });
    const bool alike = sent->dtype == data.dtype && sent->numel() == data.numel();
    if (alike && data.bytes() > 0) std::memcpy(data.data, sent->data, data.bytes());
    const int64_t elements = sent->numel();
    const DType dtype = sent->dtype;
    message.store(nullptr, std::memory_order_release);
    SHOAL_CHECK(alike, "receive", "rank {} sent {} {}, not {} {}", from, elements, Name(dtype),
                data.numel(), Name(data.dtype));
  }

  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    group_->strings[static_cast<size_t>(rank_)] = mine;
    Barrier();
    std::vector<std::string> all = group_->strings;
    group_->barrier.WaitForAll(group_->size);
    return all;
  }

 private:
  Offer& Of(int r) const { return group_->offers[static_cast<size_t>(r)]; }
  std::atomic<const View*>& Box(int from, int to) const {
    return group_
        ->mailboxes[static_cast<size_t>(from) * static_cast<size_t>(size()) +
                    static_cast<size_t>(to)]
        .message;
  }
  PeerArrays Arrays() const {
    PeerArrays arrays;
    for (const Offer& offer : group_->offers) {
      std::vector<char*>& of_rank = arrays.emplace_back();
      for (const View& piece : offer.pieces) of_rank.push_back(piece.as<char>());
    }
    return arrays;
  }

  // Runs `work` between two barriers, when all ranks have brought alike. Nothing in between throws,
  // for the others are reading this rank's buffers.
  template <class F>
  void Together(const char* name, const Offer& mine, F&& work) {
    Of(rank_) = mine;
    Barrier();
    const bool alike = Alike();
    if (alike) work();
    group_->barrier.WaitForAll(size());
    SHOAL_CHECK(alike, name, "the ranks brought arrays of different sizes, dtypes or bounds");
  }

  // Whether all ranks brought the same to this collective: the same answer on every rank.
  bool Alike() const {
    const Offer& first = Of(0);
    return std::all_of(group_->offers.begin(), group_->offers.end(), [&](const Offer& o) {
      return std::equal(first.pieces.begin(), first.pieces.end(), o.pieces.begin(), o.pieces.end(),
                        [](const View& a, const View& b) {
                          return a.dtype == b.dtype && a.numel() == b.numel();
                        }) &&
             std::equal(first.bounds.begin(), first.bounds.end(), o.bounds.begin(), o.bounds.end());
    });
  }

  std::shared_ptr<Group> group_;
  int rank_, world_rank_;
};

}  // namespace

void RunThreadRanks(int ranks, int threads_per_rank, const std::function<void(Communicator&)>& f) {
  SHOAL_CHECK(ranks >= 1, "thread ranks", "{} ranks", ranks);
  if (threads_per_rank == 0) threads_per_rank = std::max(1, KernelThreads() / ranks);
  Family family;
  const std::shared_ptr<Group> world = family.Make(ranks);
  std::mutex mutex;
  std::exception_ptr first, peer;
  std::vector<std::thread> threads;
  const auto run = [&](int rank) {
    SetThreadRank(rank);
    SetKernelThreads(threads_per_rank);
    ThreadCommunicator communicator(world, rank, rank);
    try {
      ExecutionContext context(Device{});
      const ContextScope scope(context);
      f(communicator);
    } catch (const PeerFailed&) {
      // The peer's own error is the one to report, if it has one.
      const std::lock_guard lock(mutex);
      if (peer == nullptr) peer = std::current_exception();
    } catch (...) {
      {
        const std::lock_guard lock(mutex);
        if (first == nullptr) first = std::current_exception();
      }
      communicator.Abort(0);
    }
  };
  try {
    threads.reserve(static_cast<size_t>(ranks));
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  } catch (const std::system_error& e) {
    // Those that started wait for the others and must be let go before they are joined.
    const int missing = static_cast<int>(threads.size());
    family.Abort(missing);
    for (std::thread& thread : threads) thread.join();
    SHOAL_FAIL(ErrorKind::kConfig, "thread ranks",
               "the system starts no more than {} of {} threads ({}); use fewer local ranks",
               missing, ranks, e.what());
  }
  for (std::thread& thread : threads) thread.join();
  if (first != nullptr) std::rethrow_exception(first);
  if (peer != nullptr) std::rethrow_exception(peer);
}

}  // namespace shoal
