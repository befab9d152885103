#include <algorithm>
#include <limits>

#include "kernels/copy.h"
#include "kernels/cuda/checks.h"
#include "kernels/cuda/fault.cuh"
#include "kernels/elementwise.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/matmul.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 512;

// One block per row of logits [rows, V]. Writes the loss and, if `gradient`, turns the row in place
// into scale (softmax - onehot(label)) in T, which may be narrower: element j of the gradient then
// lies over the logits 2 j' = j, all read by the time that the tile of j has been read.
template <class T>
__global__ void __launch_bounds__(kThreads)
    CrossEntropyKernel(Accumulator<T>* losses, Accumulator<T>* logits, const int32_t* labels,
                       int64_t first_row, int64_t vocabulary, Accumulator<T> scale, bool gradient,
                       bool vector, const char* op, FaultRecord* faults) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<A>;
  constexpr int64_t kStep = kThreads * N;
  const A* row = logits + blockIdx.x * vocabulary;
  T* grow = reinterpret_cast<T*>(logits + blockIdx.x * vocabulary);
  const int64_t label = labels[blockIdx.x], mine = static_cast<int64_t>(threadIdx.x) * N;
  if (label < 0 || label >= vocabulary) {  // the same for the whole block
    if (threadIdx.x == 0) {
      losses[blockIdx.x] = label < 0 ? A(0) : NotANumber<A>();
      if (label >= 0) ReportFault(faults, op, true, first_row + blockIdx.x, label, vocabulary);
    }
    if (!gradient) return;
    const A zero[N] = {};
    for (int64_t d = mine; d < vocabulary; d += kStep)
      StoreChunk(grow + d, zero, vocabulary - d, vector);
    return;
  }
  const A logit_of_label = row[label];  // before the gradient overwrites it

  // The maximum and the sum of exp(logit - maximum) in one reading. Starting from the lowest
  // finite number keeps -inf out of the differences.
  A highest = std::numeric_limits<A>::lowest(), sum = 0;
  for (int64_t d = mine; d < vocabulary; d += kStep) {
    A v[N];
    LoadChunk(v, row + d, vocabulary - d, vector);
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
  const A row_highest = BlockReduce(highest, std::numeric_limits<A>::lowest(), MaxOp());
  const A row_sum = BlockReduce(sum * exp(highest - row_highest), A(0), SumOp());
  if (threadIdx.x == 0) losses[blockIdx.x] = log(row_sum) + row_highest - logit_of_label;
  if (!gradient) return;

  const A inverse = scale / row_sum;
  for (int64_t tile = 0; tile < vocabulary; tile += kStep) {
    const int64_t d = tile + mine;
    A v[N] = {};
    if (d < vocabulary) {
      LoadChunk(v, row + d, vocabulary - d, vector);
#pragma unroll
      for (int e = 0; e < N; ++e)
        v[e] = exp(v[e] - row_highest) * inverse - (d + e == label ? scale : A(0));
    }
    if constexpr (sizeof(T) != sizeof(A)) __syncthreads();  // the whole tile is in registers
    if (d < vocabulary) StoreChunk(grow + d, v, vocabulary - d, vector);
  }
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
  if (options.share != nullptr)
    SHOAL_FAIL(ErrorKind::kConfig, op, "a vocabulary shared by ranks is computed on the CPU only");
  SHOAL_CHECK(options.chunk_tokens > 0, op, "chunk_tokens is {}", options.chunk_tokens);
  if (dx) CheckArray(op, "dx", dx, x.shape, x.dtype);
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

  Scratch x_memory(stream, dw ? chunk * width * SizeOf(x.dtype) : 0);
  Scratch logits_memory(stream, chunk * vocabulary * SizeOf(wide));
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
    Matmul(stream, logits, x_rows, w.Transposed(), {}, 0);
    VisitFloat(x.dtype, op, [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = Accumulator<T>;
      Launch(stream, op, CrossEntropyKernel<T>, GridSize(op, rows), kThreads, 0,
             losses.as<A>() + first, logits.as<A>(), labels.as<int32_t>() + first, first,
             vocabulary, A(options.gradient_scale), gradient, vocabulary % kChunk<A> == 0, op,
             StateOf(stream.device.index).faults());
    });
    // The gradient of the logits lies where the logits lay, row by row.
    View dlogits(logits.data, x.dtype, {rows, vocabulary}, x.device);
    dlogits.strides[0] = vocabulary * static_cast<int64_t>(SizeOf(wide) / SizeOf(x.dtype));
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
