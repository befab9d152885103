#include <algorithm>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/fault.cuh"
#include "kernels/embedding.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// The vocabulary, and which of its rows are here.
struct Rows {
  int64_t first, count, size;
  Rows(const TablePart& part, int64_t count)
      : first(part.first), count(count), size(part.size < 0 ? count : part.size) {}
  __device__ bool Here(int64_t id) const { return id >= first && id < first + count; }
  __device__ bool Fault(int64_t id) const { return id < 0 || id >= size; }
};

// A row whose id is not in the vocabulary becomes NaN, and the fault is reported.
template <class T>
__global__ void EmbeddingKernel(T* out, const T* table, const int32_t* ids, int64_t rows,
                                int64_t columns, Rows vocabulary, int64_t chunks, bool vector,
                                const char* op, FaultRecord* faults) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  int64_t chunk;
  const int64_t row =
      DivMod(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, chunks, &chunk);
  if (row >= rows) return;
  const int64_t d = chunk * N, id = ids[row];
  A v[N];
  if (vocabulary.Here(id)) {
    LoadChunk(v, table + (id - vocabulary.first) * columns + d, columns - d, vector);
  } else {
    const bool fault = vocabulary.Fault(id);
    if (fault && chunk == 0) ReportFault(faults, op, false, row, id, vocabulary.size);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = fault ? NotANumber<A>() : A(0);
  }
  StoreChunk(out + row * columns + d, v, columns - d, vector);
}

// The backward pass sorts the rows by id, stably, so that each row of the table is summed by one
// block in the order of M. The sort is by digits of 8 bits, least significant first. A warp counts
// and later places a share of kShare rows, 32 at a time, in order.
constexpr int kDigits = 256;
constexpr int kShare = 512;

struct SortPass {
  const int32_t* ids;  // first pass: keys are ids, order is 0, 1, ...; else null
  const int32_t *keys, *order;
  int64_t rows;
  Rows vocabulary;
  int shift;

  // A row of the table; ids that have none here sort behind all others.
  __device__ int32_t Key(int64_t i) const {
    if (!ids) return keys[i];
    const int32_t id = ids[i];
    return static_cast<int32_t>(vocabulary.Here(id) ? id - vocabulary.first : vocabulary.count);
  }
  __device__ int32_t Row(int64_t i) const { return ids ? static_cast<int32_t>(i) : order[i]; }
  __device__ int Digit(int32_t key) const { return (key >> shift) & (kDigits - 1); }
};

// counts [kDigits, shares]: how often a digit occurs in a share.
__global__ void CountKernel(int32_t* counts, SortPass pass, const char* op, FaultRecord* faults) {
  __shared__ int32_t count[kDigits];
  for (int d = threadIdx.x; d < kDigits; d += 32) count[d] = 0;
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kShare;
  for (int64_t i = begin + threadIdx.x; i < begin + kShare && i < pass.rows; i += 32) {
    const int32_t key = pass.Key(i);
    if (pass.ids && pass.vocabulary.Fault(pass.ids[i]))
      ReportFault(faults, op, false, i, pass.ids[i], pass.vocabulary.size);
    atomicAdd(&count[pass.Digit(key)], 1);
  }
  __syncwarp();
  for (int d = threadIdx.x; d < kDigits; d += 32)
    counts[static_cast<int64_t>(d) * gridDim.x + blockIdx.x] = count[d];
}

constexpr int kScanThreads = 1024;

// Replaces each of n counts by the sum of those before it.
__global__ void __launch_bounds__(kScanThreads) ScanKernel(int32_t* counts, int64_t n) {
  __shared__ int32_t sums[kScanThreads];
  const int64_t share = CeilDiv(n, kScanThreads);
  const int64_t begin = threadIdx.x * share, end = begin + share < n ? begin + share : n;
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int distance = 1; distance < kScanThreads; distance *= 2) {
    const int32_t before =
        static_cast<int>(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  int32_t running = sums[threadIdx.x] - sum;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = running;
    running += count;
  }
}

__global__ void PlaceKernel(int32_t* keys, int32_t* order, const int32_t* positions,
                            SortPass pass) {
  __shared__ int32_t next[kDigits];
  for (int d = threadIdx.x; d < kDigits; d += 32)
    next[d] = positions[static_cast<int64_t>(d) * gridDim.x + blockIdx.x];
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kShare;
  for (int64_t base = begin; base < begin + kShare && base < pass.rows; base += 32) {
    const int64_t i = base + threadIdx.x;
    const bool present = i < pass.rows;
    const int32_t key = present ? pass.Key(i) : 0;
    const int digit = present ? pass.Digit(key) : kDigits;
    const unsigned same = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(same & ((1u << threadIdx.x) - 1));
    const int32_t position = present ? next[digit] + rank : 0;
    __syncwarp();
    if (present) {
      if (rank == 0) next[digit] += __popc(same);
      keys[position] = key;
      order[position] = pass.Row(i);
    }
    __syncwarp();
  }
}

// The first of all sorted positions of an id adds them up. A thread owns kColumns columns.
constexpr int kColumns = 2, kAddThreads = 512;

template <class T>
__global__ void __launch_bounds__(kAddThreads)
    AddRowsKernel(AnyPointer dtable, bool accumulate, const T* dout, const int32_t* keys,
                  const int32_t* order, int64_t rows, int64_t columns, int64_t vocabulary,
                  bool vector) {
  using A = Accumulator<T>;
  const int64_t first = blockIdx.x;
  const int32_t id = keys[first];
  if (id >= vocabulary || (first > 0 && keys[first - 1] == id)) return;
  int64_t low = first + 1, end = rows;  // the first position with another id
  while (low < end) {
    const int64_t middle = low + (end - low) / 2;
    if (keys[middle] == id)
      low = middle + 1;
    else
      end = middle;
  }
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kColumns; d < columns;
       d += static_cast<int64_t>(blockDim.x) * kColumns) {
    A sum[kColumns] = {};
    if (accumulate) LoadChunkAny(sum, dtable, id * columns + d, columns - d, vector);
#pragma unroll 8
    for (int64_t p = first; p < end; ++p) {
      A v[kColumns];
      LoadChunk(v, dout + order[p] * columns + d, columns - d, vector);
#pragma unroll
      for (int e = 0; e < kColumns; ++e) sum[e] += v[e];
    }
    StoreChunkAny(dtable, id * columns + d, sum, columns - d, vector);
  }
}

}  // namespace

void Embedding(const Stream& stream, const View& out, const View& table, const View& ids,
               const TablePart& part) {
  const char* op = "Embedding";
  CheckRank(op, "table", table, 2);
  CheckRank(op, "ids", ids, 1);
  const int64_t rows = ids.dim(0), columns = table.dim(1);
  CheckDense(op, "table", table, table.shape);
  CheckArray(op, "ids", ids, ids.shape, DType::kI32);
  CheckArray(op, "the rows", out, {rows, columns}, table.dtype);
  if (out.numel() == 0) return;
  VisitFloat(out.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t chunks = CeilDiv(columns, kChunk<T>);
    Launch(stream, op, EmbeddingKernel<T>, GridSize(op, CeilDiv(rows * chunks, kThreads)), kThreads,
           0, out.as<T>(), table.as<T>(), ids.as<int32_t>(), rows, columns,
           Rows(part, table.dim(0)), chunks,
           columns % kChunk<T> == 0 && AllAligned16(out.data, table.data), op,
           StateOf(stream.device.index).faults());
  });
}

void EmbeddingBackward(const Stream& stream, const View& dtable, bool accumulate, const View& dout,
                       const View& ids, const TablePart& part) {
  const char* op = "EmbeddingBackward";
  CheckRank(op, "dtable", dtable, 2);
  CheckRank(op, "ids", ids, 1);
  const int64_t rows = ids.dim(0), columns = dtable.dim(1), vocabulary = dtable.dim(0);
  CheckDense(op, "dtable", dtable, dtable.shape);
  CheckComputeDType(op, "dtable", dtable);
  CheckDense(op, "dout", dout, {rows, columns});
  CheckArray(op, "ids", ids, ids.shape, DType::kI32);
  SHOAL_CHECK(rows < (int64_t{1} << 31) && vocabulary < (int64_t{1} << 31) - 1, op,
              "{} rows and a vocabulary of {} do not fit 32 bits", rows, vocabulary);
  if (!accumulate) ZeroAsync(stream, op, dtable.data, dtable.bytes());
  if (rows == 0 || columns == 0) return;

  const int64_t shares = CeilDiv(rows, kShare);
  Scratch counts(stream, kDigits * shares * sizeof(int32_t));
  Scratch sorted(stream, 4 * rows * sizeof(int32_t));  // keys and order, twice
  int32_t* buffer[2] = {sorted.as<int32_t>(), sorted.as<int32_t>() + 2 * rows};
  SortPass pass = {ids.as<int32_t>(), nullptr, nullptr, rows, Rows(part, vocabulary), 0};
  int target = 0;
  do {
    const dim3 grid(GridSize(op, shares));
    Launch(stream, op, CountKernel, grid, 32, 0, counts.as<int32_t>(), pass, op,
           StateOf(stream.device.index).faults());
    Launch(stream, op, ScanKernel, dim3(1), kScanThreads, 0, counts.as<int32_t>(),
           kDigits * shares);
    Launch(stream, op, PlaceKernel, grid, 32, 0, buffer[target], buffer[target] + rows,
           counts.as<int32_t>(), pass);
    pass.ids = nullptr;
    pass.keys = buffer[target];
    pass.order = buffer[target] + rows;
    pass.shift += 8;
    target = 1 - target;
  } while (pass.shift < 32 && (vocabulary >> pass.shift) > 0);

  VisitFloat(dout.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, AddRowsKernel<T>, GridSize(op, rows),
           RowThreads(columns, kColumns, kAddThreads), 0, AnyPointer(dtable), accumulate,
           dout.as<T>(), pass.keys, pass.order, rows, columns, vocabulary,
           columns % kColumns == 0 && AllAligned16(dtable.data, dout.data));
  });
}

}  // namespace shoal::kernels::cuda
