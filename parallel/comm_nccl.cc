// Ranks on GPUs. NCCL moves the bytes; sums are taken here, in rank order and in f32 at least, so
// that they are those of the other transports, bit for bit: NCCL's own leave their order open and
// round every partial sum to bf16. What travels is the same, a share to its owner and back.
//
// Communicators of several axes may be in use at a time, from two threads. NCCL asks that kernels
// of different communicators can run side by side, or come in one order on all ranks: ours do where
// they depend on each other.
#include "core/base/error.h"
#include "parallel/communicator.h"

#ifdef SHOAL_WITH_NCCL
#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>

#include "core/context.h"
#include "kernels/cuda_runtime.h"
#include "parallel/pieces.h"

namespace shoal {
namespace {

// Where other ranks' parts of a sum arrive, in one piece of a large array. NCCL keeps buffers of
// its own beside it; like those it is the transport's, and not counted as the run's.
constexpr int64_t kStagingBytes = int64_t{32} << 20;

void Check(ncclResult_t code, const char* call) {
  if (code == ncclSuccess) return;
  SHOAL_FAIL(ErrorKind::kBug, "nccl", "{}: {}", call, ncclGetErrorString(code));
}
#define SHOAL_NCCL(call) Check(call, #call)

// Calls that go out together, in any order.
class Together {
 public:
  Together() { SHOAL_NCCL(ncclGroupStart()); }
  void End() {
    open_ = false;
    SHOAL_NCCL(ncclGroupEnd());
  }
  ~Together() {
    if (open_) ncclGroupEnd();
  }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;

 private:
  bool open_ = true;
};

void Select(Device device) {
  SHOAL_CHECK(cudaSetDevice(device.index) == cudaSuccess, "nccl", "no device {}", device.index);
}

cudaStream_t Handle(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

// A group of NCCL's, and a stream for what is not queued on the caller's.
class Link {
 public:
  Link() = default;
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;
  ~Link() {
    if (!open()) return;
    cudaSetDevice(device_.index);
    // After an error that this rank has alone the others may be anywhere.
    if (std::uncaught_exceptions() > 0) {
      ncclCommAbort(comm_);
    } else {
      ncclCommDestroy(comm_);
    }
    cuda::DestroyStream(stream_);
  }
  // Collective over the ranks of the group.
  void Open(Device device, int size, const ncclUniqueId& id, int rank) {
    device_ = device;
    Select(device);
    stream_ = cuda::CreateStream(device.index);
    SHOAL_NCCL(ncclCommInitRank(&comm_, size, id, rank));
  }
  bool open() const { return comm_ != nullptr; }
  ncclComm_t comm() const { return comm_; }
  void* stream() const { return stream_; }

 private:
  Device device_;
  ncclComm_t comm_ = nullptr;
  void* stream_ = nullptr;
};

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> host, Device device)
      : host_(std::move(host)), device_(device) {
    if (size() == 1) return;
    ncclUniqueId id = {};
    if (rank() == 0) SHOAL_NCCL(ncclGetUniqueId(&id));
    const std::string bytes =
        host_->AllGatherStrings(rank() == 0 ? std::string(id.internal, sizeof id.internal) : "")[0];
    std::memcpy(id.internal, bytes.data(), sizeof id.internal);
    all_.Open(device_, size(), id, rank());
  }
  ~NcclCommunicator() override { cuda::Free(staging_); }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::string host() const override { return host_->host(); }
  void Barrier() override { host_->Barrier(); }
  bool concurrent() const override { return host_->concurrent(); }
  void Abort(int exit_code) override { host_->Abort(exit_code); }
  void WatchPeers(const std::function<void(int, const std::string&)>& report) override {
    host_->WatchPeers(report);
  }
  std::unique_ptr<Communicator> Subgroup(std::span<const int> members) override {
    return std::make_unique<NcclCommunicator>(host_->Subgroup(members), device_);
  }

 protected:
  bool Moves(DeviceType) const override { return true; }

  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    if (OnHost(pieces[0])) return host_->AllReduce(pieces, op);
    const std::vector<int64_t> bounds = ShardBounds(Elements(pieces), size());
    OnStream([&](const Stream& stream) {
      ReduceShares(stream, pieces, bounds, op, nullptr);
      GatherShares(stream, pieces, bounds);
    });
  }
  void DoReduceScatter(std::span<const View> pieces, std::span<const int64_t> bounds,
                       char* into) override {
    const DType dtype = pieces[0].dtype;
    if (OnHost(pieces[0])) {
      const auto r = static_cast<size_t>(rank());
      return host_->ReduceScatter(pieces, bounds, Traffic::kData,
                                  into ? View(into, dtype, {bounds[r + 1] - bounds[r]}) : View());
    }
    OnStream(
        [&](const Stream& stream) { ReduceShares(stream, pieces, bounds, ReduceOp::kSum, into); });
  }
  void DoAllGather(std::span<const View> pieces, std::span<const int64_t> bounds) override {
    if (OnHost(pieces[0])) return host_->AllGather(pieces, bounds);
    OnStream([&](const Stream& stream) { GatherShares(stream, pieces, bounds); });
  }
  void DoAllToAll(const View& send, std::span<const int64_t> send_counts, const View& receive,
                  std::span<const int64_t> receive_counts) override {
    if (OnHost(send)) return host_->AllToAll(send, send_counts, receive, receive_counts);
    OnStream([&](const Stream& stream) {
      Together together;
      int64_t from = 0, to = 0;
      for (int r = 0; r < size(); ++r) {
        const int64_t out = send_counts[static_cast<size_t>(r)];
        const int64_t in = receive_counts[static_cast<size_t>(r)];
        Put(all_, stream, Part(send, from, out), r);
        Take(all_, stream, Part(receive, to, in), r);
        from += out;
        to += in;
      }
      together.End();
    });
  }
  void DoBroadcast(const View& data, int root) override {
    if (OnHost(data)) return host_->Broadcast(data, root);
    OnStream([&](const Stream& stream) { BroadcastFrom(stream, data, root); });
  }
  // One thread may send while another receives, so neither may wait for the other: two ranks have a
  // group of NCCL's for each direction, from their first message on.
  void DoSend(const View& data, int to) override {
    if (OnHost(data)) return host_->Send(data, to);
    Link& link = LinkOf(to_, to);
    if (!link.open()) {
      ncclUniqueId id = {};
      SHOAL_NCCL(ncclGetUniqueId(&id));
      host_->Send(AsView(id), to);
      link.Open(device_, 2, id, 0);
    }
    OnStream(link, [&](const Stream& stream) { Put(link, stream, data, 1); });
  }
  void DoReceive(const View& data, int from) override {
    if (OnHost(data)) return host_->Receive(data, from);
    Link& link = LinkOf(from_, from);
    if (!link.open()) {
      ncclUniqueId id = {};
      host_->Receive(AsView(id), from);
      link.Open(device_, 2, id, 1);
    }
    OnStream(link, [&](const Stream& stream) { Take(link, stream, data, 0); });
  }
  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    return host_->AllGatherStrings(mine);
  }

 private:
  bool OnHost(const View& data) const {
    SHOAL_CHECK(data.device.type != DeviceType::kCuda || data.device == device_, "nccl",
                "an array on device {} of a rank on device {}", data.device.index, device_.index);
    return data.device.type != DeviceType::kCuda;
  }
  // Each link is used by one thread at a time.
  Link& LinkOf(std::map<int, Link>& links, int peer) {
    const std::lock_guard lock(mutex_);
    return links[peer];
  }

  // f(stream): behind what this thread's kernels do, or to its end.
  template <class F>
  void OnStream(const Link& link, F&& f) {
    Select(device_);
    const Stream& current = ExecutionContext::Current().stream();
    if (current.device == device_) return f(current);
    Stream own;
    own.device = device_;
    own.handle = link.stream();
    f(own);
    cuda::Synchronize(link.stream());
  }
  template <class F>
  void OnStream(F&& f) {
    OnStream(all_, f);
  }

  static void Put(const Link& link, const Stream& stream, const View& data, int to) {
    if (data.numel() == 0) return;
    SHOAL_NCCL(ncclSend(data.data, data.bytes(), ncclUint8, to, link.comm(), Handle(stream)));
  }
  static void Take(const Link& link, const Stream& stream, const View& data, int from) {
    if (data.numel() == 0) return;
    SHOAL_NCCL(ncclRecv(data.data, data.bytes(), ncclUint8, from, link.comm(), Handle(stream)));
  }
  static View AsView(ncclUniqueId& id) {
    return {id.internal, DType::kI32, {sizeof id.internal / 4}};
  }
  void BroadcastFrom(const Stream& stream, const View& data, int root) const {
    SHOAL_NCCL(ncclBroadcast(data.data, data.data, data.bytes(), ncclUint8, root, all_.comm(),
                             Handle(stream)));
  }

  // Every rank sends each its share, and the owner takes them together in rank order; `into` or,
  // if null, in place.
  void ReduceShares(const Stream& stream, std::span<const View> pieces,
                    std::span<const int64_t> bounds, ReduceOp op, char* into) {
    if (staging_ == nullptr) {
      staging_ = static_cast<char*>(cuda::Allocate(device_.index, kStagingBytes));
      if (staging_ == nullptr)
        SHOAL_FAIL(ErrorKind::kMemory, "nccl",
                   "the device has no {} MiB left for the sums of a group of {} ranks",
                   kStagingBytes >> 20, size());
    }
    const DType dtype = pieces[0].dtype;
    const auto width = static_cast<int64_t>(SizeOf(dtype));
    const int64_t part = kStagingBytes / width / size();
    const int64_t mine = bounds[static_cast<size_t>(rank())];
    const int64_t longest = LongestShare(bounds);
    for (int64_t at = 0; at < longest; at += part) {
      const int64_t n = PartOf(bounds, rank(), at, part);
      const View arrived(staging_, dtype, {size(), n}, device_);
      Together together;
      for (int r = 0; r < size(); ++r) {
        const int64_t first = bounds[static_cast<size_t>(r)] + at;
        ForRange(pieces, first, first + PartOf(bounds, r, at, part),
                 [&](size_t p, int64_t begin, int64_t count) {
                   Put(all_, stream, Part(pieces[p], begin, count), r);
                 });
        // In the segments in which they are sent.
        int64_t row = r * n;
        ForRange(pieces, mine + at, mine + at + n, [&](size_t, int64_t, int64_t count) {
          Take(all_, stream, Part(arrived, row, count), r);
          row += count;
        });
      }
      together.End();
      int64_t column = 0;
      ForRange(pieces, mine + at, mine + at + n, [&](size_t p, int64_t begin, int64_t count) {
        const View out = into == nullptr
                             ? Part(pieces[p], begin, count)
                             : View(into + (at + column) * width, dtype, {count}, device_);
        kernels::ReduceInOrder(stream, op, out, arrived.Narrow(1, column, count));
        column += count;
      });
    }
  }

  void GatherShares(const Stream& stream, std::span<const View> pieces,
                    std::span<const int64_t> bounds) const {
    const int64_t first = bounds[1] - bounds[0];
    bool equal = pieces.size() == 1;
    for (size_t r = 1; r < bounds.size(); ++r) equal = equal && bounds[r] - bounds[r - 1] == first;
    if (equal) {
      const View mine = Part(pieces[0], first * rank(), first);
      SHOAL_NCCL(ncclAllGather(mine.data, pieces[0].data, mine.bytes(), ncclUint8, all_.comm(),
                               Handle(stream)));
      return;
    }
    Together together;
    for (int r = 0; r < size(); ++r) {
      ForRange(pieces, bounds[static_cast<size_t>(r)], bounds[static_cast<size_t>(r) + 1],
               [&](size_t p, int64_t begin, int64_t count) {
                 BroadcastFrom(stream, Part(pieces[p], begin, count), r);
               });
    }
    together.End();
  }

  std::unique_ptr<Communicator> host_;
  Device device_;
  Link all_;
  std::mutex mutex_;
  std::map<int, Link> to_, from_;  // by rank
  char* staging_ = nullptr;
};

}  // namespace

std::unique_ptr<Communicator> MakeNcclCommunicator(std::unique_ptr<Communicator> host) {
  const Device device = ExecutionContext::Current().device();
  SHOAL_CHECK(device.type == DeviceType::kCuda, "nccl", "a rank that computes on {}",
              Name(device.type));
  return std::make_unique<NcclCommunicator>(std::move(host), device);
}

}  // namespace shoal

#else

namespace shoal {

std::unique_ptr<Communicator> MakeNcclCommunicator(std::unique_ptr<Communicator>) {
  SHOAL_FAIL(ErrorKind::kConfig, "nccl",
             "this build has no NCCL: install libnccl-dev and build again, or train on one GPU");
}

}  // namespace shoal
#endif
