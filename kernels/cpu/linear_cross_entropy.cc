// Chunks of tokens in the outer loop, blocks of the vocabulary in the inner one. The products of a
// block go through dense arrays, so that a vocabulary of any size runs at full speed, and a block
// is still in a cache when its exponentials are taken. Pass 1 keeps a running maximum and sum per
// row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3) and
// keeps e^(logit - maximum so far) in the type of x; pass 2 rescales that in place to the gradient.
#include "kernels/linear_cross_entropy.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"
#include "kernels/matmul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_cross_entropy.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

#ifndef SHOAL_KERNELS_CPU_LINEAR_CROSS_ENTROPY_TYPES_
#define SHOAL_KERNELS_CPU_LINEAR_CROSS_ENTROPY_TYPES_
namespace shoal::kernels::cpu {

// A block of columns of a chunk: [rows, width] of the logits, and of what is kept of them.
struct Block {
  int64_t rows, first, width;  // columns [first, first + width) of the vocabulary
  void* logits;                // f32 or f64, until pass 1
  void* kept;                  // in the type of x; may be the same memory; absent without backward
  const int32_t* labels;       // [rows]; those of other blocks, or of none, match no column
};

// What is known of a row after the blocks so far; also a row of VocabularyShare::merge.
struct Row {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;  // of e^(logit - max)
  double label_logit = 0;
};

}  // namespace shoal::kernels::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

template <class D>
HWY_INLINE LaneOf<D> MaxOver(D d, const LaneOf<D>* x, int64_t n) {
  const int64_t lanes = hn::Lanes(d);
  const auto lowest = hn::Set(d, -std::numeric_limits<LaneOf<D>>::infinity());
  auto m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    m0 = hn::Max(m0, hn::LoadU(d, x + i));
    m1 = hn::Max(m1, hn::LoadU(d, x + i + lanes));
    m2 = hn::Max(m2, hn::LoadU(d, x + i + 2 * lanes));
    m3 = hn::Max(m3, hn::LoadU(d, x + i + 3 * lanes));
  }
  auto max = hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(m0, m1), hn::Max(m2, m3))));
  for (; i < n; ++i) max = std::max(max, x[i]);
  return max;
}

// Pass 1. A NaN need not reach the maximum, but reaches the sum.
template <class A, class Kept>
void Exponentials(const Block& block, Row* rows, A* block_max) {
  ParallelFor(block.rows, block.rows * block.width, [&](int64_t begin, int64_t end) {
    const hn::ScalableTag<A> d;
    for (int64_t r = begin; r < end; ++r) {
      const A* x = static_cast<const A*>(block.logits) + r * block.width;
      Kept* kept = block.kept ? static_cast<Kept*>(block.kept) + r * block.width : nullptr;
      Row& row = rows[r];
      const int64_t label = block.labels[r] - block.first;
      if (label >= 0 && label < block.width) row.label_logit = x[label];
      const A max = std::max(static_cast<A>(row.max), MaxOver(d, x, block.width));
      const auto shift = hn::Set(d, max);
      const A sum = SumOver(d, block.width, [&](int64_t i, auto part) {
        auto e = ExpOf(d, hn::Sub(Load(d, x + i, part), shift));
        if constexpr (std::is_same_v<decltype(part), First>)
          e = hn::IfThenElseZero(hn::FirstN(d, part.n), e);
        if (kept) Store(d, e, kept + i, part);
        return e;
      });
      row.sum = row.sum * std::exp(row.max - static_cast<double>(max)) + static_cast<double>(sum);
      row.max = static_cast<double>(max);
      block_max[r] = max;
    }
  });
}

// Pass 2: kept [rows, width] = scale (softmax - one at the label), from what pass 1 left there.
template <class A, class Kept>
void Gradients(const Block& block, const Row* rows, const A* block_max, double scale) {
  ParallelFor(block.rows, block.rows * block.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Kept* kept = static_cast<Kept*>(block.kept) + r * block.width;
      const Row& row = rows[r];
      const A factor =
          static_cast<A>(scale * std::exp(static_cast<double>(block_max[r]) - row.max) / row.sum);
      Map<A>(
          block.width, [factor](auto d, auto v) { return hn::Mul(v, hn::Set(d, factor)); }, kept,
          const_cast<const Kept*>(kept));
      const int64_t label = block.labels[r] - block.first;
      if (label < 0 || label >= block.width) continue;
      // Not from what was kept: near 1 its rounding would be most of the difference.
      const double softmax = std::exp(row.label_logit - row.max) / row.sum;
      kept[label] = static_cast<Kept>(static_cast<A>(scale * (softmax - 1)));
    }
  });
}

void Pass1(DType type, const Block& block, Row* rows, void* block_max) {
  if (type == DType::kF64)
    return Exponentials<double, double>(block, rows, static_cast<double*>(block_max));
  float* max = static_cast<float*>(block_max);
  if (type == DType::kBF16) return Exponentials<float, BF16>(block, rows, max);
  Exponentials<float, float>(block, rows, max);
}

void Pass2(DType type, const Block& block, const Row* rows, const void* block_max, double scale) {
  if (type == DType::kF64)
    return Gradients<double, double>(block, rows, static_cast<const double*>(block_max), scale);
  const float* max = static_cast<const float*>(block_max);
  if (type == DType::kBF16) return Gradients<float, BF16>(block, rows, max, scale);
  Gradients<float, float>(block, rows, max, scale);
}

// to [n] bf16 = from [n] f32, plus `to` if accumulate.
void Narrow(BF16* to, const float* from, int64_t n, bool accumulate) {
  ParallelFlat(n, [=](int64_t begin, int64_t end) {
    if (accumulate)
      Map<float>(
          end - begin, [](auto, auto a, auto b) { return hn::Add(a, b); }, to + begin, from + begin,
          const_cast<const BF16*>(to) + begin);
    else
      Map<float>(
          end - begin, [](auto, auto a) { return a; }, to + begin, from + begin);
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(Pass1);
HWY_EXPORT(Pass2);
HWY_EXPORT(Narrow);

constexpr const char* kOp = "linear_cross_entropy";
constexpr int32_t kNoLabel = std::numeric_limits<int32_t>::min();

// Equal blocks of the vocabulary, a multiple of 64 wide: large enough for the products, small
// enough that the logits of 256 tokens stay in the last level cache.
int64_t BlockWidth(int64_t vocab) {
  constexpr int64_t kTarget = 8192, kStep = 64;
  vocab = std::max<int64_t>(vocab, 1);
  const int64_t blocks = (vocab + kTarget - 1) / kTarget;
  return ((vocab + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
}

// Number of rows that count. Fills `valid` with their indices.
int64_t FindValid(const View& labels, int64_t vocab, int32_t* valid) {
  int64_t count = 0;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    const int32_t label = labels.as<const int32_t>()[i];
    if (label >= vocab)
      SHOAL_FAIL(ErrorKind::kData, kOp,
                 "row {} has label {}, but the vocabulary has {} entries: the data was made with "
                 "another tokenizer, or the model's vocab is too small",
                 i, label, vocab);
    if (label >= 0) valid[count++] = static_cast<int32_t>(i);
  }
  return count;
}

void CopyRow(const View& to, int64_t to_row, const View& from, int64_t from_row) {
  const size_t bytes = static_cast<size_t>(from.dim(1)) * SizeOf(from.dtype);
  if (bytes)
    std::memcpy(to.as<char>() + bytes * static_cast<size_t>(to_row),
                from.as<char>() + bytes * static_cast<size_t>(from_row), bytes);
}

void SetZero(const View& v) {
  if (v.bytes()) std::memset(v.data, 0, v.bytes());
}

}  // namespace

void LinearCrossEntropy(const Stream& stream, const View& losses, const View& dx, const View& dw,
                        bool accumulate_dw, const View& x, const View& w, const View& labels,
                        const LinearCrossEntropyOptions& options) {
  CheckRank(kOp, "x", x, 2);
  CheckRank(kOp, "w", w, 2);
  const int64_t tokens = x.dim(0), depth = x.dim(1), vocab = w.dim(0);
  const DType type = x.dtype, sum_type = AccumulatorDType(type);
  CheckArray(kOp, "x", x, {tokens, depth}, type);
  CheckArray(kOp, "w", w, {vocab, depth}, type);
  CheckArray(kOp, "labels", labels, {tokens}, DType::kI32);
  CheckArray(kOp, "losses", losses, {tokens}, sum_type);
  if (dx) CheckArray(kOp, "dx", dx, {tokens, depth}, dx.dtype == sum_type ? sum_type : type);
  if (dw) CheckArray(kOp, "dw", dw, {vocab, depth}, dw.dtype == sum_type ? sum_type : type);
  SHOAL_CHECK(IsFloat(type) && type != DType::kF16, kOp, "computes in f64, f32 or bf16, not {}",
              Name(type));
  SHOAL_CHECK(options.chunk_tokens >= 1, kOp, "chunk_tokens is {}", options.chunk_tokens);

  const Scratch valid_memory(stream, sizeof(int32_t) * 2 * static_cast<size_t>(tokens));
  int32_t* valid = valid_memory.as<int32_t>();
  const VocabularyShare* share = options.share;
  const bool counting = stream.counting();  // as if all tokens had a label
  const int64_t count = counting ? tokens : FindValid(labels, share ? share->size : vocab, valid);
  const bool backward = (dx || dw) && vocab > 0, narrow = type == DType::kBF16;
  // Rows that count are gathered, but for the loss alone. Memory must not depend on how many they
  // are, and that of products depends on their shapes: so chunks are as many of the chunks of all
  // rows as it takes, and zeros fill up the last. Until dx is computed it holds what is gathered.
  const bool gather = backward && count < tokens;
  int32_t* row_labels = valid + tokens;
  // Relative to the first row of w: labels that it does not have match no block.
  const auto first_row = static_cast<int32_t>(share ? share->first : 0);
  for (int64_t i = 0; i < tokens && !counting; ++i) {
    const int32_t label =
        gather && i >= count ? -1 : labels.as<const int32_t>()[gather ? valid[i] : i];
    row_labels[i] = label < 0 ? kNoLabel : label - first_row;
  }

  const int64_t chunk = std::min(options.chunk_tokens, tokens), width = BlockWidth(vocab);
  const int64_t blocks = (vocab + width - 1) / width;
  // dx is summed over blocks, dw over chunks, both in f32: in place where they are f32 themselves.
  const bool dx_direct = dx.dtype == sum_type || blocks == 1;
  // A narrow dw of several chunks would need a wide sum. Where it takes no more memory, what all
  // chunks keep is held instead, and dw is one product.
  const bool hold =
      backward && dw && narrow && dw.dtype == type && tokens > chunk && tokens <= 2 * depth + chunk;
  const bool dw_direct = dw.dtype == sum_type || tokens <= chunk || hold;
  const int64_t held = hold ? tokens : chunk;
  auto bytes = [](DType dtype, int64_t rows, int64_t columns) {
    return SizeOf(dtype) * static_cast<size_t>(rows * columns);
  };
  const Scratch row_memory(stream, sizeof(Row) * static_cast<size_t>(chunk));
  const Scratch max_memory(stream, bytes(sum_type, blocks, chunk));
  const bool in_place = backward && !narrow;
  const Scratch logits_memory(stream,
                              bytes(sum_type, chunk, in_place ? vocab : std::min(width, vocab)));
  const Scratch kept_memory(stream, backward && narrow ? bytes(type, held, vocab) : 0);
  const Scratch x_memory(stream, backward && !dx ? bytes(type, held, depth) : 0);
  const Scratch dx_memory(stream, dx && !dx_direct ? bytes(sum_type, chunk, depth) : 0);
  const Scratch dw_memory(stream, dw && !dw_direct ? bytes(sum_type, vocab, depth) : 0);
  Row* rows = row_memory.as<Row>();

  if (count < tokens) SetZero(losses);
  if (dx && (count == 0 || vocab == 0) && !counting) SetZero(dx);
  if (count == 0) {
    if (dw && !accumulate_dw && !counting) SetZero(dw);
    return;
  }

  const int64_t end =
      gather && !hold ? std::min(tokens, (count + chunk - 1) / chunk * chunk) : tokens;
  auto x_rows = [&](int64_t begin, int64_t n) {
    if (!gather) return x.Narrow(0, begin, n);
    char* data = dx ? dx.as<char>() + bytes(hold ? type : dx.dtype, begin, depth)
                    : x_memory.as<char>() + bytes(type, hold ? begin : 0, depth);
    return View(data, type, {n, depth});
  };
  auto block_at = [&](int64_t begin, int64_t b) {
    const int64_t n = std::min(chunk, end - begin);
    const int64_t first = b * width, columns = std::min(width, vocab - first);
    char* logits = logits_memory.as<char>() + (in_place ? bytes(sum_type, n, first) : 0);
    void* kept = !backward  ? nullptr
                 : in_place ? logits
                            : kept_memory.as<char>() + bytes(type, hold ? end : n, first) +
                                  bytes(type, hold ? begin : 0, columns);
    return Block{n, first, columns, logits, kept, row_labels + begin};
  };
  auto block_max = [&](int64_t b) { return max_memory.as<char>() + bytes(sum_type, b, chunk); };
  // Block after block of a chunk.
  auto add_dx = [&](int64_t begin, const Block& block) {
    const int64_t n = block.rows;
    const View to = dx.Narrow(0, begin, n);
    const View sum = dx_direct ? to : View(dx_memory.as<void>(), sum_type, {n, depth});
    Matmul(stream, sum, View(block.kept, type, {n, block.width}),
           w.Narrow(0, block.first, block.width), {}, block.first > 0 ? 1 : 0);
    if (!dx_direct && block.first + block.width == vocab && !counting)
      HWY_DYNAMIC_DISPATCH(Narrow)(to.as<BF16>(), sum.as<const float>(), n * depth, false);
  };

  for (int64_t begin = 0; begin < end; begin += chunk) {
    const int64_t n = std::min(chunk, end - begin);
    const View xc = x_rows(begin, n);
    for (int64_t r = 0; r < n && gather; ++r) {
      if (begin + r < count)
        CopyRow(xc, r, x, valid[begin + r]);
      else
        SetZero(xc.Narrow(0, r, 1));
    }
    if (!counting) std::fill(rows, rows + n, Row{});
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(begin, b);
      Matmul(stream, View(block.logits, sum_type, {n, block.width}), xc,
             w.Narrow(0, block.first, block.width).Transposed(), {}, 0);
      if (!counting) HWY_DYNAMIC_DISPATCH(Pass1)(type, block, rows, block_max(b));
    }
    if (share && !counting) share->merge(&rows->max, n);
    for (int64_t r = 0; r < n && !counting; ++r) {
      if (row_labels[begin + r] == kNoLabel) continue;
      const double loss = std::log(rows[r].sum) + (rows[r].max - rows[r].label_logit);
      const int64_t to = gather ? valid[begin + r] : begin + r;
      if (sum_type == DType::kF64)
        losses.as<double>()[to] = loss;
      else
        losses.as<float>()[to] = static_cast<float>(loss);
    }
    if (!backward) continue;

    const View dw_sum = dw_direct ? dw : View(dw_memory.as<void>(), sum_type, {vocab, depth});
    const bool add_dw = begin > 0 || (dw_direct && accumulate_dw);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_at(begin, b);
      if (!counting)
        HWY_DYNAMIC_DISPATCH(Pass2)(type, block, rows, block_max(b), options.gradient_scale);
      if (dx && !gather) add_dx(begin, block);
      if (dw && !hold)
        Matmul(stream, dw_sum.Narrow(0, block.first, block.width),
               View(block.kept, type, {n, block.width}).Transposed(), xc, {}, add_dw ? 1 : 0);
    }
    // Over what was gathered.
    for (int64_t b = 0; b < blocks && dx && gather && !hold; ++b) add_dx(begin, block_at(begin, b));
  }
  for (int64_t b = 0; b < blocks && hold; ++b) {
    const Block block = block_at(0, b);
    const View d(block.kept, type, {end, block.width});
    Matmul(stream, dw.Narrow(0, block.first, block.width), d.Transposed(), x_rows(0, end), {},
           accumulate_dw ? 1 : 0);
  }
  if (dx && gather) {
    for (int64_t begin = 0; begin < end && hold; begin += chunk)
      for (int64_t b = 0; b < blocks; ++b) add_dx(begin, block_at(begin, b));
    // To their places, from the last: none lies before where it comes from.
    for (int64_t row = tokens - 1, from = count - 1; row >= 0; --row) {
      if (from < 0 || valid[from] != row)
        SetZero(dx.Narrow(0, row, 1));
      else if (from != row)
        CopyRow(dx, row, dx, from--);
      else
        break;  // and so are all before it
    }
  }
  if (dw && !dw_direct && !counting) {
    HWY_DYNAMIC_DISPATCH(Narrow)
    (dw.as<BF16>(), dw_memory.as<const float>(), vocab * depth, accumulate_dw);
  }
}

}  // namespace shoal::kernels::cpu
#endif
