// Ranks as MPI processes. On one host, collectives go through a shared-memory window that all ranks
// map: OpenMPI 4.1's own are several times slower. Across hosts MPI moves bytes only, and sums are
// taken here: MPI leaves their order open, and has no bf16.
#include "parallel/communicator.h"

#ifdef SHOAL_WITH_MPI
#define OMPI_SKIP_MPICXX 1  // the C++ bindings would need a library of their own
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <exception>
#include <numeric>

#include "core/context.h"
#include "kernels/reduce_arrays.h"
#include "parallel/pieces.h"
#include "parallel/shared_window.h"
#include "parallel/watchdog.h"

namespace shoal {
namespace {

constexpr int64_t kPartBytes = int64_t{1} << 20;  // to a rank in one of MPI's calls

void Check(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  SHOAL_FAIL(ErrorKind::kBug, "mpi", "{}: {}", call, text);
}
#define SHOAL_MPI(call) Check(call, #call)

// MPI is started once per process and ended when the process ends in order.
struct MpiRuntime {
  MpiRuntime() {
    int level = 0;
    SHOAL_MPI(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level));
    SHOAL_CHECK(level >= MPI_THREAD_FUNNELED, "mpi", "the library offers thread level {} only",
                level);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    multiple = level >= MPI_THREAD_MULTIPLE;
  }
  ~MpiRuntime() { MPI_Finalize(); }
  bool multiple = false;  // whether several threads may call MPI at once
};

MpiRuntime& Runtime() {
  static MpiRuntime runtime;
  return runtime;
}

// Of this process: all its communicators tell it where they are.
std::unique_ptr<Watchdog>& ProcessWatchdog() {
  static std::unique_ptr<Watchdog> watchdog;
  return watchdog;
}

// In a collective, as seen from the other ranks.
class InCollective {
 public:
  explicit InCollective(Collective collective) {
    if (const auto& watchdog = ProcessWatchdog()) watchdog->Enter(collective);
  }
  ~InCollective() {
    if (const auto& watchdog = ProcessWatchdog()) watchdog->Leave();
  }
  InCollective(const InCollective&) = delete;
  InCollective& operator=(const InCollective&) = delete;
};

class MpiCommunicator : public Communicator {
 public:
  // Takes `comm` over; MPI_COMM_WORLD stays.
  MpiCommunicator(MPI_Comm comm, bool shared_memory) : comm_(comm), shared_memory_(shared_memory) {
    SHOAL_MPI(MPI_Comm_rank(comm_, &rank_));
    SHOAL_MPI(MPI_Comm_size(comm_, &size_));
    char name[MPI_MAX_PROCESSOR_NAME] = {};
    int length = 0;
    SHOAL_MPI(MPI_Get_processor_name(name, &length));
    host_.assign(name, static_cast<size_t>(length));
    if (size_ > 1 && shared_memory_) OpenWindow();
  }
  ~MpiCommunicator() override {
    if (comm_ == MPI_COMM_WORLD) ProcessWatchdog().reset();
    // What follows is collective. An error that ends this rank alone must come to its Abort: the
    // others may be anywhere.
    if (std::uncaught_exceptions() > 0) return;
    if (beacons_ != MPI_WIN_NULL) MPI_Win_free(&beacons_);
    if (memory_ != MPI_WIN_NULL) MPI_Win_free(&memory_);
    if (comm_ != MPI_COMM_WORLD) MPI_Comm_free(&comm_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string host() const override { return host_; }
  void Barrier() override {
    if (window_ != nullptr) return window_->Barrier();
    SHOAL_MPI(MPI_Barrier(comm_));
  }
  void WatchPeers(const std::function<void(int, const std::string&)>& report) override {
    if (window_ == nullptr || comm_ != MPI_COMM_WORLD) return;
    void* base = nullptr;
    const MPI_Aint bytes = static_cast<MPI_Aint>(sizeof(Beacon)) * size_;
    SHOAL_MPI(
        MPI_Win_allocate_shared(rank_ == 0 ? bytes : 0, 1, MPI_INFO_NULL, comm_, &base, &beacons_));
    MPI_Aint window_bytes = 0;
    int unit = 0;
    SHOAL_MPI(MPI_Win_shared_query(beacons_, 0, &window_bytes, &unit, &base));
    if (rank_ == 0) std::memset(base, 0, static_cast<size_t>(bytes));
    SHOAL_MPI(MPI_Barrier(comm_));
    ProcessWatchdog() =
        std::make_unique<Watchdog>(static_cast<Beacon*>(base), rank_, size_, report);
  }
  bool ShareMemory() override {
    if (window_ == nullptr) return false;
    // All that a rank may need, more than it will find; together no more than four machines.
    const ExecutionContext& context = ExecutionContext::Current();
    const size_t machine =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    std::shared_ptr<SharedRange> mine;
    if (context.device().type == DeviceType::kCpu)
      mine = SharedRange::Create(machine / static_cast<size_t>(size_) *
                                 static_cast<size_t>(std::min(size_, 4)));
    const std::vector<std::string> tickets =
        DoAllGatherStrings(mine != nullptr ? mine->ticket() : "");
    SharedWindow::Pools pools;
    for (int r = 0; r < size_; ++r)
      pools.push_back(r == rank_ ? mine : SharedRange::Open(tickets[static_cast<size_t>(r)]));
    const bool missing = std::find(pools.begin(), pools.end(), nullptr) != pools.end();
    if (MaxOverRanks(missing ? 1 : 0) > 0) return false;
    mine->Close();  // everybody has it
    context.allocator()->Share(mine);
    window_->set_pools(std::move(pools));
    return true;
  }
  void Abort(int exit_code) override {
    if (size_ > 1) MPI_Abort(MPI_COMM_WORLD, exit_code);
  }
  bool concurrent() const override { return window_ != nullptr || Runtime().multiple; }

  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    const auto mine = std::find(members.begin(), members.end(), rank_) - members.begin();
    SHOAL_CHECK(mine < static_cast<std::ptrdiff_t>(members.size()), "subgroup",
                "rank {} asks for a group that it is not in", rank_);
    MPI_Comm comm = MPI_COMM_NULL;
    SHOAL_MPI(MPI_Comm_split(comm_, members[0], static_cast<int>(mine), &comm));
    auto group = std::make_unique<MpiCommunicator>(comm, shared_memory_);
    SHOAL_CHECK(group->size() == static_cast<int>(members.size()), "subgroup",
                "the ranks disagree on who is in the group of rank {}", members[0]);
    if (window_ != nullptr && group->window_ != nullptr && !window_->pools().empty()) {
      SharedWindow::Pools pools;
      for (const int member : members)
        pools.push_back(window_->pools()[static_cast<size_t>(member)]);
      group->window_->set_pools(std::move(pools));
    }
    return group;
  }

 protected:
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    const InCollective mark(Collective::kAllReduce);
    if (window_ != nullptr) return window_->AllReduce(pieces, op);
    const std::vector<int64_t> bounds = ShardBounds(Elements(pieces), size_);
    ReduceScatterMpi(pieces, bounds, op, nullptr);
    AllGatherMpi(pieces, bounds);
  }

  void DoReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                       char* into) override {
    const InCollective mark(Collective::kReduceScatter);
    if (window_ != nullptr) return window_->ReduceScatter(pieces, bounds, into);
    ReduceScatterMpi(pieces, bounds, ReduceOp::kSum, into);
  }

  void DoAllGather(std::span<const View> pieces, std::span<const int64_t> bounds) override {
    const InCollective mark(Collective::kAllGather);
    if (window_ != nullptr) return window_->AllGather(pieces, bounds);
    AllGatherMpi(pieces, bounds);
  }

  void DoAllToAll(const View& send, std::span<const int64_t> send_counts, const View& receive,
                  std::span<const int64_t> receive_counts) override {
    const InCollective mark(Collective::kAllToAll);
    const std::vector<int64_t> from = Offsets(send_counts), to = Offsets(receive_counts);
    const int64_t width = static_cast<int64_t>(SizeOf(send.dtype));
    if (window_ != nullptr) {
      const int64_t longest = MaxOverRanks(std::max(LongestShare(from), LongestShare(to)));
      return window_->AllToAll(send, from, receive, to, longest);
    }
    MoveMpi(
        from, to, width,
        [&](int64_t first, int64_t n, char* out) {
          std::memcpy(out, send.as<char>() + first * width, static_cast<size_t>(n * width));
        },
        [&](int, int64_t first, int64_t n, const char* in) {
          std::memcpy(receive.as<char>() + first * width, in, static_cast<size_t>(n * width));
        });
  }

  void DoBroadcast(const View& data, int root) override {
    const InCollective mark(Collective::kBroadcast);
    ForSteps(data, [&](void* at, int n) { SHOAL_MPI(MPI_Bcast(at, n, MPI_BYTE, root, comm_)); });
  }
  void DoSend(const View& data, int to) override {
    ForSteps(data, [&](void* at, int n) { SHOAL_MPI(MPI_Send(at, n, MPI_BYTE, to, 0, comm_)); });
  }
  void DoReceive(const View& data, int from) override {
    ForSteps(data, [&](void* at, int n) {
      MPI_Status status;
      SHOAL_MPI(MPI_Recv(at, n, MPI_BYTE, from, 0, comm_, &status));
      int got = 0;
      SHOAL_MPI(MPI_Get_count(&status, MPI_BYTE, &got));
      SHOAL_CHECK(got == n, "receive", "rank {} sent {} bytes, not {}", from, got, n);
    });
  }

  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    const InCollective mark(Collective::kAllGatherStrings);
    const size_t ranks = static_cast<size_t>(size_);
    std::vector<int> lengths(ranks), offsets(ranks);
    const int length = static_cast<int>(std::min<size_t>(mine.size(), INT_MAX));
    SHOAL_MPI(MPI_Allgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, comm_));
    // All see the same lengths, so all refuse what MPI's counts cannot say.
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    SHOAL_CHECK(total < INT_MAX, "all-gather", "the ranks' strings have {} bytes or more", total);
    for (size_t r = 1; r < ranks; ++r) offsets[r] = offsets[r - 1] + lengths[r - 1];
    std::string joined(static_cast<size_t>(offsets.back() + lengths.back()), '\0');
    SHOAL_MPI(MPI_Allgatherv(mine.data(), length, MPI_BYTE, joined.data(), lengths.data(),
                             offsets.data(), MPI_BYTE, comm_));
    std::vector<std::string> all;
    for (size_t r = 0; r < ranks; ++r) {
      all.push_back(
          joined.substr(static_cast<size_t>(offsets[r]), static_cast<size_t>(lengths[r])));
    }
    return all;
  }

 private:
  // If all ranks share a host.
  void OpenWindow() {
    MPI_Comm node = MPI_COMM_NULL;
    SHOAL_MPI(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node));
    int node_size = 0;
    SHOAL_MPI(MPI_Comm_size(node, &node_size));
    if (node_size == size_) {
      const MPI_Aint bytes = SharedWindow::Bytes(size_);
      void* base = nullptr;
      SHOAL_MPI(
          MPI_Win_allocate_shared(rank_ == 0 ? bytes : 0, 1, MPI_INFO_NULL, node, &base, &memory_));
      MPI_Aint window_bytes = 0;
      int unit = 0;
      SHOAL_MPI(MPI_Win_shared_query(memory_, 0, &window_bytes, &unit, &base));
      if (rank_ == 0) std::memset(base, 0, SharedWindow::kHeaderBytes);
      SHOAL_MPI(MPI_Barrier(node));
      window_ = std::make_unique<SharedWindow>(base, rank_, size_);
    }
    MPI_Comm_free(&node);
  }

  // `data` in steps whose sizes MPI can count.
  template <class F>
  static void ForSteps(const View& data, F&& f) {
    constexpr int64_t kStep = int64_t{1} << 30;
    const int64_t bytes = static_cast<int64_t>(data.bytes());
    int64_t at = 0;
    do {
      const int64_t n = std::min(kStep, bytes - at);
      f(data.as<char>() + at, static_cast<int>(n));
      at += n;
    } while (at < bytes);
  }

  static std::vector<int64_t> Offsets(std::span<const int64_t> counts) {
    std::vector<int64_t> offsets = {0};
    for (const int64_t count : counts) offsets.push_back(offsets.back() + count);
    return offsets;
  }
  int64_t MaxOverRanks(int64_t value) const {
    int64_t most = 0;
    SHOAL_MPI(MPI_Allreduce(&value, &most, 1, MPI_INT64_T, MPI_MAX, comm_));
    return most;
  }

  // Bytes from every rank to every rank, a part at a time: read(first, n, to) fetches n elements of
  // what this rank sends, in which rank r's share begins at from[r]; write(r, first, n, data)
  // receives rank r's n elements for the place that begins at to[r].
  template <class Read, class Write>
  void MoveMpi(std::span<const int64_t> from, std::span<const int64_t> to, int64_t width,
               Read&& read, Write&& write) const {
    const int64_t part = kPartBytes / width;
    const size_t ranks = static_cast<size_t>(size_);
    std::vector<char> out(ranks * kPartBytes), in(ranks * kPartBytes);
    std::vector<int> out_counts(ranks), in_counts(ranks), offsets(ranks);
    for (size_t r = 0; r < ranks; ++r) offsets[r] = static_cast<int>(r * kPartBytes);
    const int64_t longest = MaxOverRanks(std::max(LongestShare(from), LongestShare(to)));
    for (int64_t at = 0; at < longest; at += part) {
      for (int r = 0; r < size_; ++r) {
        const auto i = static_cast<size_t>(r);
        const int64_t n = PartOf(from, r, at, part);
        if (n > 0) read(from[i] + at, n, out.data() + offsets[i]);
        out_counts[i] = static_cast<int>(n * width);
        in_counts[i] = static_cast<int>(PartOf(to, r, at, part) * width);
      }
      SHOAL_MPI(MPI_Alltoallv(out.data(), out_counts.data(), offsets.data(), MPI_BYTE, in.data(),
                              in_counts.data(), offsets.data(), MPI_BYTE, comm_));
      for (int r = 0; r < size_; ++r) {
        const auto i = static_cast<size_t>(r);
        const int64_t n = PartOf(to, r, at, part);
        if (n > 0) write(r, to[i] + at, n, in.data() + offsets[i]);
      }
    }
  }

  // Every rank sends each its share, and the owner adds them up in rank order.
  void ReduceScatterMpi(std::span<const View> pieces, std::span<const int64_t> bounds, ReduceOp op,
                        char* into) const {
    const DType dtype = pieces[0].dtype;
    const int64_t width = static_cast<int64_t>(SizeOf(dtype));
    const int64_t mine = bounds[static_cast<size_t>(rank_)];
    const int64_t n = bounds[static_cast<size_t>(rank_) + 1] - mine;
    // What arrives is laid out as one share per rank.
    std::vector<int64_t> to;
    for (int64_t r = 0; r <= size_; ++r) to.push_back(r * n);
    std::vector<char> parts;
    std::vector<const void*> sources;
    MoveMpi(
        bounds, to, width,
        [&](int64_t first, int64_t count, char* out) { Cursor(pieces, first).CopyIn(count, out); },
        [&](int r, int64_t first, int64_t count, const char* in) {
          sources.push_back(in);
          if (r + 1 < size_) return;
          const int64_t at = first - to[static_cast<size_t>(r)];
          if (into == nullptr) parts.resize(static_cast<size_t>(count * width));
          void* const outs[] = {into != nullptr ? into + at * width : parts.data()};
          kernels::cpu::ReduceArrays(dtype, op, sources, outs, count);
          if (into == nullptr) Cursor(pieces, mine + at).CopyOut(count, parts.data());
          sources.clear();
        });
  }

  void AllGatherMpi(std::span<const View> pieces, std::span<const int64_t> bounds) const {
    const int64_t width = static_cast<int64_t>(SizeOf(pieces[0].dtype));
    const int64_t mine = bounds[static_cast<size_t>(rank_)];
    const int64_t n = bounds[static_cast<size_t>(rank_) + 1] - mine;
    std::vector<int64_t> from;  // the same share for each
    for (int64_t r = 0; r <= size_; ++r) from.push_back(r * n);
    MoveMpi(
        from, bounds, width,
        [&](int64_t first, int64_t count, char* out) {
          Cursor(pieces, mine + first % n).CopyIn(count, out);
        },
        [&](int r, int64_t first, int64_t count, const char* in) {
          if (r != rank_) Cursor(pieces, first).CopyOut(count, in);
        });
  }

  MPI_Comm comm_;
  bool shared_memory_;
  int rank_ = 0, size_ = 1;
  std::string host_;
  MPI_Win memory_ = MPI_WIN_NULL, beacons_ = MPI_WIN_NULL;
  std::unique_ptr<SharedWindow> window_;  // in memory_; null: the ranks do not share a host
};

}  // namespace

std::unique_ptr<Communicator> MakeMpiCommunicator(bool shared_memory) {
  Runtime();
  return std::make_unique<MpiCommunicator>(MPI_COMM_WORLD, shared_memory);
}

std::string MpiDescription() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string version(text, static_cast<size_t>(length));
  return version.substr(0, version.find(','));
}

}  // namespace shoal

#else

namespace shoal {

std::unique_ptr<Communicator> MakeMpiCommunicator(bool) {
  SHOAL_FAIL(
      ErrorKind::kConfig, "mpi",
      "this build has no MPI; use --local-ranks N, or install libopenmpi-dev and build again");
}
std::string MpiDescription() { return ""; }

}  // namespace shoal
#endif
