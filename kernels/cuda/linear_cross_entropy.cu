#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/copy.h"
#include "kernels/cuda/checks.h"
#include "kernels/cuda/fault.cuh"
#include "kernels/cuda_runtime.h"
#include "kernels/elementwise.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/matmul.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 512;

// What a block does with a row of logits [V], N elements a thread at a time.
template <class T>
struct Row {
  using A = Accumulator<T>;
  static constexpr int N = kChunk<A>;
  static constexpr int64_t kStep = kThreads * N;

  A* logits;
  int64_t vocabulary;
  bool vector;

  __device__ int64_t mine() const { return static_cast<int64_t>(threadIdx.x) * N; }
  // In T, which may be narrower: element j of the gradient then lies over the logits 2 j' = j.
  __device__ T* gradient() const { return reinterpret_cast<T*>(logits); }

  // The maximum and the sum of exp(logit - maximum) in one reading. Starting from the lowest finite
  // number keeps -inf out of the differences.
  __device__ void Reduce(A* row_highest, A* row_sum) const {
    A highest = std::numeric_limits<A>::lowest(), sum = 0;
    for (int64_t d = mine(); d < vocabulary; d += kStep) {
      A v[N];
      LoadChunk(v, logits + d, vocabulary - d, vector);
      A peak = highest;
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (d + e < vocabulary && v[e] > peak) peak = v[e];
      if (peak > highest) {
        sum *= exp(highest - peak);
        highest = peak;
      }
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (d + e < vocabulary) sum += exp(v[e] - highest);
    }
    *row_highest = BlockReduce(highest, std::numeric_limits<A>::lowest(), MaxOp());
    *row_sum = BlockReduce(sum * exp(highest - *row_highest), A(0), SumOp());
  }

  // Turns the row in place into scale (softmax - onehot(label)): all logits that an element lies
  // over have been read by the time that its tile has been.
  __device__ void Differentiate(A highest, A sum, int64_t label, A scale) const {
    const A inverse = scale / sum;
    for (int64_t tile = 0; tile < vocabulary; tile += kStep) {
      const int64_t d = tile + mine();
      A v[N] = {};
      if (d < vocabulary) {
        LoadChunk(v, logits + d, vocabulary - d, vector);
#pragma unroll
        for (int e = 0; e < N; ++e)
          v[e] = exp(v[e] - highest) * inverse - (d + e == label ? scale : A(0));
      }
      if constexpr (sizeof(T) != sizeof(A)) __syncthreads();  // the whole tile is in registers
      if (d < vocabulary) StoreChunk(gradient() + d, v, vocabulary - d, vector);
    }
  }

  __device__ void Clear() const {
    const A zero[N] = {};
    for (int64_t d = mine(); d < vocabulary; d += kStep)
      StoreChunk(gradient() + d, zero, vocabulary - d, vector);
  }
};

// What the blocks of a chunk know, one for each row of logits [rows, V].
template <class T>
struct Chunk {
  using A = Accumulator<T>;
  A* losses;
  A* logits;
  const int32_t* labels;
  int64_t first_row, vocabulary;  // of the rows that this rank has
  int64_t first, size;            // of the whole vocabulary
  A scale;
  bool gradient, vector;
  const char* op;
  FaultRecord* faults;

  __device__ Row<T> row() const { return {logits + blockIdx.x * vocabulary, vocabulary, vector}; }
  __device__ int64_t label() const { return labels[blockIdx.x]; }
  // A row without a label, or with one that does not exist; the same for the whole block.
  __device__ bool Skip() const {
    if (label() >= 0 && label() < size) return false;
    if (threadIdx.x == 0) {
      losses[blockIdx.x] = label() < 0 ? A(0) : NotANumber<A>();
      if (label() >= 0) ReportFault(faults, op, true, first_row + blockIdx.x, label(), size);
    }
    if (gradient) row().Clear();
    return true;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) CrossEntropyKernel(Chunk<T> chunk) {
  using A = Accumulator<T>;
  if (chunk.Skip()) return;
  const Row<T> row = chunk.row();
  const A logit_of_label = row.logits[chunk.label()];  // before the gradient overwrites it
  A highest, sum;
  row.Reduce(&highest, &sum);
  if (threadIdx.x == 0) chunk.losses[blockIdx.x] = log(sum) + highest - logit_of_label;
  if (chunk.gradient) row.Differentiate(highest, sum, chunk.label(), chunk.scale);
}

// The two halves of it around VocabularyShare::merge.
template <class T>
__global__ void __launch_bounds__(kThreads) PartOfRowsKernel(double* rows, Chunk<T> chunk) {
  using A = Accumulator<T>;
  const Row<T> row = chunk.row();
  A highest, sum;
  row.Reduce(&highest, &sum);
  if (threadIdx.x != 0) return;
  const int64_t label = chunk.label() - chunk.first;
  double* out = rows + 3 * static_cast<int64_t>(blockIdx.x);
  out[0] = highest;
  out[1] = sum;
  out[2] = label >= 0 && label < row.vocabulary ? static_cast<double>(row.logits[label]) : 0.0;
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    SharedCrossEntropyKernel(const double* rows, Chunk<T> chunk) {
  using A = Accumulator<T>;
  if (chunk.Skip()) return;
  const double* whole = rows + 3 * static_cast<int64_t>(blockIdx.x);
  const A highest = static_cast<A>(whole[0]), sum = static_cast<A>(whole[1]);
  if (threadIdx.x == 0) chunk.losses[blockIdx.x] = log(sum) + highest - static_cast<A>(whole[2]);
  if (chunk.gradient)
    chunk.row().Differentiate(highest, sum, chunk.label() - chunk.first, chunk.scale);
}

// out = x with zeros in ignored rows: the product for dw multiplies each row by its gradient, which
// is 0 there, and 0 times an infinity would not be.
template <class T>
__global__ void __launch_bounds__(kThreads)
    KeepLabelledKernel(T* out, const T* x, const int32_t* labels, int64_t rows, int64_t columns,
                       int64_t chunks, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  int64_t chunk;
  const int64_t row =
      DivMod(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, chunks, &chunk);
  if (row >= rows) return;
  const int64_t d = chunk * N;
  A v[N] = {};
  if (labels[row] >= 0) LoadChunk(v, x + row * columns + d, columns - d, vector);
  StoreChunk(out + row * columns + d, v, columns - d, vector);
}

}  // namespace

void LinearCrossEntropy(const Stream& stream, const View& losses, const View& dx, const View& dw,
                        bool accumulate_dw, const View& x, const View& w, const View& labels,
                        const LinearCrossEntropyOptions& options) {
  const char* op = "linear_cross_entropy";
  CheckRank(op, "x", x, 2);
  CheckRank(op, "w", w, 2);
  const int64_t tokens = x.dim(0), width = x.dim(1), vocabulary = w.dim(0);
  const DType wide = AccumulatorDType(x.dtype);
  CheckDense(op, "x", x, x.shape);
  CheckArray(op, "w", w, {vocabulary, width}, x.dtype);
  CheckArray(op, "labels", labels, {tokens}, DType::kI32);
  CheckArray(op, "losses", losses, {tokens}, wide);
  SHOAL_CHECK(options.chunk_tokens > 0, op, "chunk_tokens is {}", options.chunk_tokens);
  if (dx) CheckArray(op, "dx", dx, x.shape, dx.dtype == wide ? wide : x.dtype);
  if (dw) {
    CheckDense(op, "dw", dw, w.shape);
    SHOAL_CHECK(SizeOf(dw.dtype) >= SizeOf(w.dtype), op, "dw is {}, narrower than w, {}",
                Name(dw.dtype), Name(w.dtype));
  }
  if (tokens == 0) {
    if (dw && !accumulate_dw) Fill(stream, dw, 0);
    return;
  }
  const int64_t chunk = std::min(options.chunk_tokens, tokens);
  const bool gradient = dx || dw;
  const VocabularyShare* share = options.share;

  Scratch x_memory(stream, dw ? chunk * width * SizeOf(x.dtype) : 0);
  Scratch logits_memory(stream, chunk * vocabulary * SizeOf(wide));
  Scratch rows_memory(stream, share ? chunk * 3 * sizeof(double) : 0);
  std::vector<double> host_rows;
  // A bf16 sum over many chunks would lose digits at each: it is held in f32.
  const bool wide_sum = dw && dw.dtype == DType::kBF16 && (chunk < tokens || accumulate_dw);
  Scratch sum_memory(stream, wide_sum ? w.numel() * SizeOf(wide) : 0);
  const View dw_sum = wide_sum ? View(sum_memory.as<char>(), wide, w.shape, w.device) : dw;
  bool add = accumulate_dw && !wide_sum;

  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t rows = std::min(chunk, tokens - first);
    View x_rows = x.Narrow(0, first, rows);
    if (dw) {
      const View kept(x_memory.as<char>(), x.dtype, {rows, width}, x.device);
      VisitFloat(x.dtype, op, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t chunks = CeilDiv(width, kChunk<T>);
        Launch(stream, op, KeepLabelledKernel<T>, GridSize(op, CeilDiv(rows * chunks, kThreads)),
               kThreads, 0, kept.as<T>(), x_rows.as<T>(), labels.as<int32_t>() + first, rows, width,
               chunks, width % kChunk<T> == 0 && AllAligned16(kept.data, x_rows.data));
      });
      x_rows = kept;
    }
    const View logits(logits_memory.as<char>(), wide, {rows, vocabulary}, x.device);
    if (vocabulary > 0) Matmul(stream, logits, x_rows, w.Transposed(), {}, 0);
    VisitFloat(x.dtype, op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = Accumulator<T>;
      const Chunk<T> part = {losses.as<A>() + first,
                             logits.as<A>(),
                             labels.as<int32_t>() + first,
                             first,
                             vocabulary,
                             share ? share->first : 0,
                             share ? share->size : vocabulary,
                             A(options.gradient_scale),
                             gradient,
                             vocabulary % kChunk<A> == 0,
                             op,
                             StateOf(stream.device.index).faults()};
      const auto launch = [&](auto kernel, auto... arguments) {
        Launch(stream, op, kernel, GridSize(op, rows), kThreads, 0, arguments..., part);
      };
      if (share == nullptr) return launch(CrossEntropyKernel<T>);
      // Through the host, where ranks exchange small things.
      double* of_rows = rows_memory.as<double>();
      launch(PartOfRowsKernel<T>, of_rows);
      host_rows.resize(static_cast<size_t>(3 * rows));
      const size_t bytes = host_rows.size() * sizeof(double);
      ::shoal::cuda::CopyToHost(stream.handle, host_rows.data(), of_rows, bytes);
      share->merge(host_rows.data(), rows);
      ::shoal::cuda::CopyToDevice(stream.handle, of_rows, host_rows.data(), bytes);
      launch(SharedCrossEntropyKernel<T>, of_rows);
    });
    // The gradient of the logits lies where the logits lay, row by row.
    View dlogits(logits.data, x.dtype, {rows, vocabulary}, x.device);
    dlogits.strides[0] = vocabulary * static_cast<int64_t>(SizeOf(wide) / SizeOf(x.dtype));
    if (vocabulary == 0) {  // another rank's share
      if (dx) Fill(stream, dx.Narrow(0, first, rows), 0);
      continue;
    }
    if (dx) Matmul(stream, dx.Narrow(0, first, rows), dlogits, w, {}, 0);
    if (dw) {
      Matmul(stream, dw_sum, dlogits.Transposed(), x_rows, {}, add ? 1 : 0);
      add = true;
    }
  }
  if (!wide_sum) return;
  if (accumulate_dw)
    Add(stream, dw, dw, dw_sum, 1, 1);
  else
    Copy(stream, dw, dw_sum);
}

}  // namespace shoal::kernels::cuda
