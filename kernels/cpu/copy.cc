#include "kernels/copy.h"

#include <cstring>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/copy.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

template <class To, class From>
void ConvertContiguous(void* to, const void* from, int64_t n, bool past) {
  MapPastCaches<ComputeType<To, From>>(
      n, past, [](auto, auto v) { return v; }, static_cast<To*>(to),
      static_cast<const From*>(from));
}

// Converts n contiguous elements between the three types that training uses. False: not these.
bool ConvertFloats(DType to_type, void* to, DType from_type, const void* from, int64_t n,
                   bool past) {
  using F = void (*)(void*, const void*, int64_t, bool);
  constexpr F kTable[3][3] = {
      {nullptr, ConvertContiguous<double, float>, ConvertContiguous<double, BF16>},
      {ConvertContiguous<float, double>, nullptr, ConvertContiguous<float, BF16>},
      {ConvertContiguous<BF16, double>, ConvertContiguous<BF16, float>, nullptr}};
  const int i = static_cast<int>(to_type), j = static_cast<int>(from_type);
  if (i > 2 || j > 2 || !kTable[i][j]) return false;
  kTable[i][j](to, from, n, past);
  return true;
}

// n bytes past the caches; `to` is aligned to 64.
void CopyPastCaches(void* to, const void* from, int64_t n) {
  const hn::ScalableTag<uint8_t> d;
  const int64_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  auto* out = static_cast<uint8_t*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < whole; i += lanes) hn::Stream(hn::LoadU(d, in + i), d, out + i);
  std::memcpy(out + whole, in + whole, n - whole);
  hwy::FlushStream();
}

// n bytes of `to`, which is aligned to the elements that `pattern` [64] repeats.
void FillBytes(void* to, const uint8_t* pattern, int64_t n, bool past) {
  const hn::CappedTag<uint8_t, 64> d;
  const int64_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  auto* out = static_cast<uint8_t*>(to);
  const auto v = hn::LoadU(d, pattern);
  for (int64_t i = 0; i < whole; i += lanes)
    past ? hn::Stream(v, d, out + i) : hn::StoreU(v, d, out + i);
  std::memcpy(out + whole, pattern, n - whole);
  if (past) hwy::FlushStream();
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(ConvertFloats);
HWY_EXPORT(CopyPastCaches);
HWY_EXPORT(FillBytes);

template <class To, class From>
To Convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<From, BF16> || std::is_same_v<From, F16>) {
    return static_cast<To>(static_cast<float>(x));
  } else if constexpr (std::is_integral_v<From> && !std::is_arithmetic_v<To>) {
    return static_cast<To>(static_cast<float>(x));
  } else {
    return static_cast<To>(x);
  }
}

struct Row {  // n elements with a stride on each side
  void* to;
  int64_t to_stride;
  const void* from;
  int64_t from_stride;
  int64_t n;
};

template <class To, class From>
void ConvertStrided(const Row& r) {
  To* to = static_cast<To*>(r.to);
  const From* from = static_cast<const From*>(r.from);
  for (int64_t i = 0; i < r.n; ++i) to[i * r.to_stride] = Convert<To>(from[i * r.from_stride]);
}

using RowFunction = void (*)(const Row&);
RowFunction StridedFunction(DType to, DType from) {
  return VisitAny(to, [&](auto t) {
    return VisitAny(from, [&](auto f) -> RowFunction {
      return ConvertStrided<typename decltype(t)::type, typename decltype(f)::type>;
    });
  });
}

// A copy as loops: size, stride of out and of x per dimension, the innermost last. Dimensions of
// size 1 are gone, neighbours that are one in memory are merged, and out's smallest stride is last.
struct Loops {
  int rank = 0;
  int64_t size[Dims::kMaxRank], to[Dims::kMaxRank], from[Dims::kMaxRank];

  void Swap(int a, int b) {
    std::swap(size[a], size[b]);
    std::swap(to[a], to[b]);
    std::swap(from[a], from[b]);
  }
  Loops(const View& out, const View& x) {
    for (int d = 0; d < out.rank(); ++d) {
      if (out.shape[d] == 1) continue;
      size[rank] = out.shape[d];
      to[rank] = out.strides[d];
      from[rank++] = x.strides[d];
    }
    for (int a = 1; a < rank; ++a)
      for (int b = a; b > 0 && to[b - 1] < to[b]; --b) Swap(b - 1, b);
    int kept = 0;
    for (int d = 1; d < rank; ++d) {
      if (to[kept] == to[d] * size[d] && from[kept] == from[d] * size[d]) {
        size[d] *= size[kept];
      } else {
        ++kept;
      }
      size[kept] = size[d];
      to[kept] = to[d];
      from[kept] = from[d];
    }
    rank = rank ? kept + 1 : 0;
    if (rank == 0) {
      size[0] = to[0] = from[0] = 1;
      rank = 1;
    }
  }
};

void CopyRow(const View& out, const View& x, RowFunction strided, const Row& r, bool past) {
  if (r.to_stride == 1 && r.from_stride == 1) {
    if (out.dtype == x.dtype) {
      const size_t bytes = r.n * SizeOf(out.dtype);
      if (past) {
        HWY_DYNAMIC_DISPATCH(CopyPastCaches)(r.to, r.from, bytes);
      } else {
        std::memcpy(r.to, r.from, bytes);
      }
      return;
    }
    if (HWY_DYNAMIC_DISPATCH(ConvertFloats)(out.dtype, r.to, x.dtype, r.from, r.n, past)) return;
  }
  strided(r);
}

// A copy that does not read x along its rows goes through square tiles. They are gathered in the
// order in which x lies in memory, because lines that are a power of two apart evict each other
// before their next element is read.
constexpr int64_t kTile = 32;

// tile [kTile, kTile] = from [rows, columns], in elements of U's size.
template <class U>
void GatherTile(void* tile, const void* from, int64_t rows, int64_t columns, int64_t row_stride,
                int64_t column_stride) {
  const U* x = static_cast<const U*>(from);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r)
      static_cast<U*>(tile)[r * kTile + c] = x[r * row_stride + c * column_stride];
}

using TileFunction = void (*)(void*, const void*, int64_t, int64_t, int64_t, int64_t);
TileFunction GatherFunction(size_t element_size) {
  switch (element_size) {
    case 1:
      return GatherTile<uint8_t>;
    case 2:
      return GatherTile<uint16_t>;
    case 4:
      return GatherTile<uint32_t>;
    default:
      return GatherTile<uint64_t>;
  }
}

}  // namespace

void Copy(const Stream&, const View& out, const View& x) {
  CheckShape("Copy", "x", x, out.shape);
  const int64_t n = out.numel();
  if (n == 0) return;
  const Loops loops(out, x);
  const RowFunction strided = StridedFunction(out.dtype, x.dtype);
  const int inner = loops.rank - 1;
  const int64_t to_size = SizeOf(out.dtype), from_size = SizeOf(x.dtype);
  const bool past = inner == 0 && WritesPastCaches(out, {&x});
  const auto row = [&](int64_t to, const char* from, int64_t from_stride, int64_t count) {
    CopyRow(out, x, strided,
            {out.as<char>() + to * to_size, loops.to[inner], from, from_stride, count}, past);
  };
  const auto* source = x.as<const char>();
  if (inner == 0) {
    ParallelFlat(n, [&](int64_t begin, int64_t end) {
      row(begin * loops.to[0], source + begin * loops.from[0] * from_size, loops.from[0],
          end - begin);
    });
    return;
  }
  const TileFunction gather = GatherFunction(SizeOf(x.dtype));
  const int64_t rows = loops.size[inner - 1], columns = loops.size[inner];
  const bool tiled = loops.from[inner] != 1 && loops.from[inner] != 0;
  const int64_t strips = tiled ? (rows + kTile - 1) / kTile : rows;
  const int64_t strip = tiled ? kTile : 1;
  ParallelFor(n / rows / columns * strips, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t rest = i / strips, to = 0, from = 0;
      for (int d = inner - 2; d >= 0; --d) {
        to += rest % loops.size[d] * loops.to[d];
        from += rest % loops.size[d] * loops.from[d];
        rest /= loops.size[d];
      }
      const int64_t r0 = i % strips * strip, r1 = std::min(rows, r0 + strip);
      from += r0 * loops.from[inner - 1];
      to += r0 * loops.to[inner - 1];
      if (!tiled) {
        row(to, source + from * from_size, loops.from[inner], columns);
        continue;
      }
      for (int64_t c = 0; c < columns; c += kTile) {
        alignas(64) char tile[kTile * kTile * 8];
        const int64_t width = std::min(kTile, columns - c);
        gather(tile, source + (from + c * loops.from[inner]) * from_size, r1 - r0, width,
               loops.from[inner - 1], loops.from[inner]);
        for (int64_t r = 0; r < r1 - r0; ++r)
          row(to + r * loops.to[inner - 1] + c * loops.to[inner], tile + r * kTile * from_size, 1,
              width);
      }
    }
  });
}

void Fill(const Stream& stream, const View& out, double value) {
  uint8_t pattern[64];
  VisitAny(out.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T v = static_cast<T>(value);
    for (size_t i = 0; i < sizeof(pattern); i += sizeof(T)) std::memcpy(pattern + i, &v, sizeof(T));
  });
  if (out.contiguous()) {
    const int64_t size = SizeOf(out.dtype);
    const bool past = WritesPastCaches(out, {});
    ParallelFlat(out.numel(), [&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(FillBytes)
      (out.as<char>() + begin * size, pattern, (end - begin) * size, past);
    });
    return;
  }
  View x(pattern, out.dtype, out.shape);  // one element, repeated by strides of 0
  for (int d = 0; d < x.rank(); ++d) x.strides[d] = 0;
  Copy(stream, out, x);
}

}  // namespace shoal::kernels::cpu
#endif
