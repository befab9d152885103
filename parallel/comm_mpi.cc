// Ranks as MPI processes. On one host, sums go through a shared-memory window that all ranks map:
// OpenMPI 4.1's own all-reduce is several times slower. Across hosts MPI moves them. MPI has no
// bf16: it is widened to f32 on the way.
#include "parallel/communicator.h"

#ifdef SHOAL_WITH_MPI
#define OMPI_SKIP_MPICXX 1  // the C++ bindings would need a library of their own
#include <mpi.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <numeric>

#include "parallel/reduce_arrays.h"
#include "parallel/shared_barrier.h"

namespace shoal {
namespace {

constexpr int64_t kStagingBytes = int64_t{1}
                                  << 20;  // per rank and buffer: together within the L2 cache

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
    SHOAL_MPI(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level));
    SHOAL_CHECK(level >= MPI_THREAD_FUNNELED, "mpi", "the library offers thread level {} only",
                level);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  }
  ~MpiRuntime() { MPI_Finalize(); }
};

// Walks the concatenation of several arrays.
class Cursor {
 public:
  Cursor(std::span<const View> pieces, int64_t width) : pieces_(pieces), width_(width) {}

  // Calls f(memory, offset in bytes within these n elements, bytes) for the next n elements.
  template <class F>
  void Move(int64_t n, F&& f) {
    for (int64_t done = 0; done < n;) {
      const int64_t count = std::min(n - done, pieces_[piece_].numel() - at_);
      if (count > 0) f(pieces_[piece_].as<char>() + at_ * width_, done * width_, count * width_);
      done += count;
      at_ += count;
      if (at_ == pieces_[piece_].numel()) {
        ++piece_;
        at_ = 0;
      }
    }
  }

 private:
  std::span<const View> pieces_;
  int64_t width_;
  size_t piece_ = 0;
  int64_t at_ = 0;
};

class MpiCommunicator : public Communicator {
 public:
  MpiCommunicator() {
    static MpiRuntime runtime;
    SHOAL_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank_));
    SHOAL_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size_));
    char name[MPI_MAX_PROCESSOR_NAME] = {};
    int length = 0;
    SHOAL_MPI(MPI_Get_processor_name(name, &length));
    host_.assign(name, static_cast<size_t>(length));
    if (size_ > 1) OpenWindow();
  }
  ~MpiCommunicator() override {
    if (window_ != MPI_WIN_NULL) MPI_Win_free(&window_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string host() const override { return host_; }
  void Barrier() override { SHOAL_MPI(MPI_Barrier(MPI_COMM_WORLD)); }
  void Abort(int exit_code) override {
    if (size_ > 1) MPI_Abort(MPI_COMM_WORLD, exit_code);
  }

 protected:
  void DoAllReduce(std::span<const View> pieces, ReduceOp op) override {
    if (barrier_ != nullptr) return AllReduceShared(pieces, op);
    for (const View& piece : pieces) AllReduceMpi(piece, op);
  }

  void DoBroadcast(const View& data, int root) override {
    constexpr int64_t kStep = int64_t{1} << 30;  // MPI counts are int
    const int64_t bytes = static_cast<int64_t>(data.bytes());
    for (int64_t at = 0; at < bytes; at += kStep) {
      const int n = static_cast<int>(std::min(kStep, bytes - at));
      SHOAL_MPI(MPI_Bcast(data.as<char>() + at, n, MPI_BYTE, root, MPI_COMM_WORLD));
    }
  }

  std::vector<std::string> DoAllGatherStrings(const std::string& mine) override {
    const size_t ranks = static_cast<size_t>(size_);
    std::vector<int> lengths(ranks), offsets(ranks);
    const int length = static_cast<int>(std::min<size_t>(mine.size(), INT_MAX));
    SHOAL_MPI(MPI_Allgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD));
    // All see the same lengths, so all refuse what MPI's counts cannot say.
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    SHOAL_CHECK(total < INT_MAX, "all-gather", "the ranks' strings have {} bytes or more", total);
    for (size_t r = 1; r < ranks; ++r) offsets[r] = offsets[r - 1] + lengths[r - 1];
    std::string joined(static_cast<size_t>(offsets.back() + lengths.back()), '\0');
    SHOAL_MPI(MPI_Allgatherv(mine.data(), length, MPI_BYTE, joined.data(), lengths.data(),
                             offsets.data(), MPI_BYTE, MPI_COMM_WORLD));
    std::vector<std::string> all;
    for (size_t r = 0; r < ranks; ++r) {
      all.push_back(
          joined.substr(static_cast<size_t>(offsets[r]), static_cast<size_t>(lengths[r])));
    }
    return all;
  }

 private:
  // If all ranks share a host: a window with a barrier, two staging buffers per rank and two for
  // sums.
  void OpenWindow() {
    MPI_Comm node = MPI_COMM_NULL;
    SHOAL_MPI(
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node));
    int node_size = 0;
    SHOAL_MPI(MPI_Comm_size(node, &node_size));
    if (node_size == size_) {
      const MPI_Aint bytes = kHeader + kStagingBytes * 2 * (size_ + 1);
      void* base = nullptr;
      SHOAL_MPI(
          MPI_Win_allocate_shared(rank_ == 0 ? bytes : 0, 1, MPI_INFO_NULL, node, &base, &window_));
      MPI_Aint window_bytes = 0;
      int unit = 0;
      SHOAL_MPI(MPI_Win_shared_query(window_, 0, &window_bytes, &unit, &base));
      if (rank_ == 0) std::memset(base, 0, kHeader);
      SHOAL_MPI(MPI_Barrier(node));
      barrier_ = static_cast<SharedBarrier*>(base);
      staging_ = static_cast<char*>(base) + kHeader;
    }
    MPI_Comm_free(&node);
  }

  char* Staging(int r, int buffer) const { return staging_ + (2 * r + buffer) * kStagingBytes; }
  char* Sums(int buffer) const { return Staging(size_, buffer); }

  // Chunk after chunk: copy mine into my staging buffer, sum my slice of everybody's, copy the sums
  // out. The buffers take turns: who fills one again has passed a barrier that all reached after
  // reading it.
  void AllReduceShared(std::span<const View> pieces, ReduceOp op) {
    const DType dtype = pieces[0].dtype;
    const int64_t width = static_cast<int64_t>(SizeOf(dtype)), chunk = kStagingBytes / width;
    std::vector<const void*> sources(static_cast<size_t>(size_));
    int64_t total = 0;
    for (const View& piece : pieces) total += piece.numel();
    Cursor in(pieces, width), out(pieces, width);
    for (int64_t begin = 0; begin < total; begin += chunk, buffer_ ^= 1) {
      const int64_t n = std::min(chunk, total - begin);
      in.Move(n, [&](const char* memory, int64_t at, int64_t bytes) {
        std::memcpy(Staging(rank_, buffer_) + at, memory, static_cast<size_t>(bytes));
      });
      barrier_->Wait(size_);
      const int64_t from = n * rank_ / size_, to = n * (rank_ + 1) / size_;
      for (int r = 0; r < size_; ++r)
        sources[static_cast<size_t>(r)] = Staging(r, buffer_) + from * width;
      if (to > from) ReduceArrays(dtype, op, sources, Sums(buffer_) + from * width, to - from);
      barrier_->Wait(size_);
      out.Move(n, [&](char* memory, int64_t at, int64_t bytes) {
        std::memcpy(memory, Sums(buffer_) + at, static_cast<size_t>(bytes));
      });
    }
  }

  void AllReduceMpi(const View& piece, ReduceOp op) {
    const MPI_Op mpi_op = op == ReduceOp::kSum ? MPI_SUM : MPI_MAX;
    constexpr int64_t kStep = int64_t{1} << 22;
    std::vector<float> wide;
    for (int64_t at = 0; at < piece.numel(); at += kStep) {
      const int n = static_cast<int>(std::min(kStep, piece.numel() - at));
      if (piece.dtype == DType::kF64) {
        SHOAL_MPI(MPI_Allreduce(MPI_IN_PLACE, piece.as<double>() + at, n, MPI_DOUBLE, mpi_op,
                                MPI_COMM_WORLD));
      } else if (piece.dtype == DType::kF32) {
        SHOAL_MPI(MPI_Allreduce(MPI_IN_PLACE, piece.as<float>() + at, n, MPI_FLOAT, mpi_op,
                                MPI_COMM_WORLD));
      } else {
        SHOAL_CHECK(piece.dtype == DType::kBF16, "all-reduce", "no sums of {}", Name(piece.dtype));
        BF16* values = piece.as<BF16>() + at;
        wide.resize(static_cast<size_t>(n));
        for (int i = 0; i < n; ++i) wide[static_cast<size_t>(i)] = static_cast<float>(values[i]);
        SHOAL_MPI(MPI_Allreduce(MPI_IN_PLACE, wide.data(), n, MPI_FLOAT, mpi_op, MPI_COMM_WORLD));
        for (int i = 0; i < n; ++i) values[i] = BF16(wide[static_cast<size_t>(i)]);
      }
    }
  }

  static constexpr int64_t kHeader = 4096;
  int rank_ = 0, size_ = 1;
  std::string host_;
  MPI_Win window_ = MPI_WIN_NULL;
  SharedBarrier* barrier_ = nullptr;  // null: the ranks do not share a host
  char* staging_ = nullptr;
  int buffer_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> MakeMpiCommunicator() { return std::make_unique<MpiCommunicator>(); }

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

std::unique_ptr<Communicator> MakeMpiCommunicator() {
  SHOAL_FAIL(
      ErrorKind::kConfig, "mpi",
      "this build has no MPI; use --local-ranks N, or install libopenmpi-dev and build again");
}
std::string MpiDescription() { return ""; }

}  // namespace shoal
#endif
