// f32 and bf16 products by oneDNN.
//
// Two routes, chosen by layout and shape alone, so that no result depends on the number of threads:
//   team   one primitive that spreads over the threads itself: dense operands, `a` by rows, where
//          oneDNN has packed kernels ("brg"). Those never split K between threads for such an `a`.
//   tiles  a fixed grid of tiles of d, each computed by one thread with a one-thread primitive. For
//          `a` by columns (dW = dY^T X: a team splits K where d has fewer 64-wide column blocks
//          than there are threads, and tiles are a little faster), for padded leading dimensions
//          (oneDNN falls back to a GEMM that splits K freely), for f32 with wide rows of b (a team
//          reads them unpacked), for batches, and on CPUs without packed kernels.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string_view>
#include <unordered_map>

#include "core/base/thread_count.h"
#include "kernels/cpu/matmul_internal.h"

namespace shoal::kernels::cpu {
namespace {

// OpenMP team size of this thread for the time of a scope; oneDNN reads it when a primitive is made
// and again when it runs.
class TeamSize {
 public:
  explicit TeamSize(int threads) : saved_(omp_get_max_threads()), changed_(threads != saved_) {
    if (changed_) omp_set_num_threads(threads);
  }
  ~TeamSize() {
    if (changed_) omp_set_num_threads(saved_);
  }
  TeamSize(const TeamSize&) = delete;
  TeamSize& operator=(const TeamSize&) = delete;

 private:
  int saved_;
  bool changed_;
};

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::memory::data_type DnnlType(DType dtype) {
  return dtype == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

// All that a primitive is compiled for.
struct Key {
  int64_t m, n, k, a_row, a_column, b_row, b_column, d_row;
  int32_t threads;
  DType operand, result, bias_type;
  uint8_t flags;  // 1: accumulate, 2: bias

  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = static_cast<uint64_t>(key.threads) << 32 | static_cast<uint64_t>(key.flags) << 24 |
                 static_cast<uint64_t>(key.operand) << 16 | static_cast<uint64_t>(key.result) << 8 |
                 static_cast<uint64_t>(key.bias_type);
    for (int64_t v :
         {key.m, key.n, key.k, key.a_row, key.a_column, key.b_row, key.b_column, key.d_row}) {
      h = (h ^ static_cast<uint64_t>(v)) * 0x9E3779B97F4A7C15ull;
      h ^= h >> 29;
    }
    return h;
  }
};

// A compiled product. The primitive may run in several threads at once; memory objects may not, so
// each thread of a team has a slot of its own.
class Compiled {
 public:
  explicit Compiled(const Key& key) : flags_(key.flags) {
    using dnnl::memory;
    const memory::desc a({key.m, key.k}, DnnlType(key.operand), {key.a_row, key.a_column});
    const memory::desc b({key.k, key.n}, DnnlType(key.operand), {key.b_row, key.b_column});
    const memory::desc d({key.m, key.n}, DnnlType(key.result), {key.d_row, 1});
    const memory::desc bias({1, key.n}, DnnlType(key.bias_type), {key.n, 1});
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (flags_ & 1) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const TeamSize team(key.threads);
    descriptor_ = dnnl::matmul::primitive_desc(
        flags_ & 2 ? dnnl::matmul::desc(a, b, bias, d) : dnnl::matmul::desc(a, b, d), attributes,
        Engine());
    primitive_ = dnnl::matmul(descriptor_);
    const size_t bytes = descriptor_.scratchpad_desc().get_size();
    scratch_bytes_ = (bytes + 63) / 64 * 64;
  }

  size_t scratch_bytes() const { return scratch_bytes_; }
  std::string_view implementation() const { return descriptor_.impl_info_str(); }

  void ReserveSlots(int count) {
    while (static_cast<int>(slots_.size()) < count) {
      auto make = [&](const dnnl::memory::desc& desc) {
        return dnnl::memory(desc, Engine(), nullptr);
      };
      Slot slot{dnnl::stream(Engine()), make(descriptor_.src_desc()),
                make(descriptor_.weights_desc()), make(descriptor_.dst_desc()),
                make(descriptor_.scratchpad_desc())};
      if (flags_ & 2) slot.bias = make(descriptor_.bias_desc());
      slots_.push_back(std::move(slot));
    }
  }

  // `slot` < the count reserved, one thread a slot. Does not throw: runs inside parallel regions.
  dnnl_status_t Run(int slot, const void* a, const void* b, const void* bias, void* d,
                    void* scratch) noexcept {
    Slot& s = slots_[slot];
    dnnl_exec_arg_t args[5];
    int count = 0;
    dnnl_status_t status = dnnl_success;
    auto pass = [&](int arg, const dnnl::memory& memory, const void* data) {
      const dnnl_status_t set = dnnl_memory_set_data_handle(memory.get(), const_cast<void*>(data));
      if (set != dnnl_success) status = set;
      args[count++] = {arg, memory.get()};
    };
    pass(DNNL_ARG_SRC, s.a, a);
    pass(DNNL_ARG_WEIGHTS, s.b, b);
    pass(DNNL_ARG_DST, s.d, d);
    if (scratch_bytes_) pass(DNNL_ARG_SCRATCHPAD, s.scratch, scratch);
    if (flags_ & 2) pass(DNNL_ARG_BIAS, s.bias, bias);
    if (status != dnnl_success) return status;
    return dnnl_primitive_execute(primitive_.get(), s.stream.get(), count, args);
  }

 private:
  struct Slot {
    dnnl::stream stream;
    dnnl::memory a, b, d, scratch, bias;
  };

  uint8_t flags_;
  dnnl::matmul::primitive_desc descriptor_;
  dnnl::matmul primitive_;
  size_t scratch_bytes_ = 0;
  std::deque<Slot> slots_;
};

// The compiled products of this thread. Shapes repeat from step to step; a caller whose shapes
// never repeat (a growing cache in generation) empties it now and then.
class Cache {
 public:
  // Pointers from Get stay good until the next MakeRoom.
  void MakeRoom() {
    if (map_.size() > kMax) map_.clear();
  }
  Compiled* Get(const Key& key) {
    auto& entry = map_[key];
    if (!entry) {
      try {
        entry = std::make_unique<Compiled>(key);
      } catch (const dnnl::error& error) {
        map_.erase(key);
        SHOAL_FAIL(ErrorKind::kBug, "matmul", "oneDNN refuses [{}, {}] x [{}, {}] in {}: {}", key.m,
                   key.k, key.k, key.n, Name(key.operand), error.what());
      }
    }
    return entry.get();
  }

 private:
  static constexpr size_t kMax = 1024;
  std::unordered_map<Key, std::unique_ptr<Compiled>, KeyHash> map_;
};

Cache& ThreadCache() {
  static thread_local Cache cache;
  return cache;
}

enum class Support { kNone, kGemm, kPacked };

// What oneDNN has on this CPU: bf16 needs AVX-512, packed kernels the instructions for their type.
Support SupportOf(DType operand) {
  static const auto probe = [](DType dtype) {
    try {
      const Compiled compiled({64, 64, 64, 64, 1, 64, 1, 64, 1, dtype, dtype, dtype, 0});
      const std::string_view name = compiled.implementation();
      if (name.starts_with("brg")) return Support::kPacked;
      return name.starts_with("ref") ? Support::kNone : Support::kGemm;
    } catch (const dnnl::error&) {
      return Support::kNone;
    }
  };
  static const Support f32 = std::max(Support::kGemm, probe(DType::kF32));
  static const Support bf16 = probe(DType::kBF16);
  return operand == DType::kBF16 ? bf16 : f32;
}

Key KeyOf(const Product& p, int64_t m, int64_t n, int threads) {
  return {m,
          n,
          p.k,
          p.a_row,
          p.a_column,
          p.b_row,
          p.b_column,
          p.d_row,
          threads,
          p.operand,
          p.result,
          p.bias ? p.bias_type : p.result,
          static_cast<uint8_t>((p.accumulate ? 1 : 0) | (p.bias ? 2 : 0))};
}

const char* At(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * static_cast<int64_t>(SizeOf(dtype));
}

[[noreturn]] void FailRun(const Product& p, dnnl_status_t status) {
  SHOAL_FAIL(ErrorKind::kBug, "matmul", "oneDNN status {} in [{}, {}] x [{}, {}] {}",
             static_cast<int>(status), p.m, p.k, p.k, p.n, Name(p.operand));
}

void RunTeam(const Stream& stream, const Product& p, int threads) {
  Compiled* compiled = ThreadCache().Get(KeyOf(p, p.m, p.n, threads));
  compiled->ReserveSlots(1);
  const Scratch scratch(stream, compiled->scratch_bytes());
  if (stream.counting()) return;
  const TeamSize team(threads);
  const dnnl_status_t status = compiled->Run(0, p.a, p.b, p.bias, p.d, scratch.as<void>());
  if (status != dnnl_success) FailRun(p, status);
}

// The grid of tiles: a function of the shape only, because the shape of a tile decides how oneDNN
// blocks K and with it the last bits. Packing is repeated in each tile, so they are as large as
// they can be, equal but for the last, and at least 4 for the sake of threads.
struct Grid {
  int64_t rows, columns;  // of a tile
};

Grid GridOf(const Product& p) {
  constexpr int64_t kStep = 32, kLeast = 128;
  const bool a_by_rows = p.a_column == 1;
  auto parts = [](int64_t size, int64_t target) { return (size + target - 1) / target; };
  int64_t down = parts(p.m, a_by_rows ? 512 : 384), across = parts(p.n, a_by_rows ? 512 : 768);
  while (p.batch * down * across < 4) {
    const int64_t rows = p.m / down, columns = p.n / across;
    if (std::max(rows, columns) <= kLeast) break;
    ++(rows > columns ? down : across);
  }
  auto tile = [](int64_t size, int64_t count) {
    return std::min(size, ((size + count - 1) / count + kStep - 1) / kStep * kStep);
  };
  return {tile(p.m, down), tile(p.n, across)};
}

void RunTiles(const Stream& stream, const Product& p, int threads) {
  const auto [rows, columns] = GridOf(p);
  const int64_t row_tiles = (p.m + rows - 1) / rows, column_tiles = (p.n + columns - 1) / columns;
  const int64_t tiles = p.batch * row_tiles * column_tiles;
  const int64_t last_rows = p.m - (row_tiles - 1) * rows;
  const int64_t last_columns = p.n - (column_tiles - 1) * columns;
  if (tiles == 1) threads = 1;  // else all: libgomp starts a team anew when its size changes

  Compiled* compiled[2][2];  // [last row of tiles][last column of tiles]
  size_t scratch_bytes = 0;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      compiled[i][j] =
          ThreadCache().Get(KeyOf(p, i ? last_rows : rows, j ? last_columns : columns, 1));
      compiled[i][j]->ReserveSlots(threads);
      scratch_bytes = std::max(scratch_bytes, compiled[i][j]->scratch_bytes());
    }
  }
  const Scratch scratch(stream, scratch_bytes * static_cast<size_t>(threads));
  if (stream.counting()) return;
  std::atomic<dnnl_status_t> failure{dnnl_success};
  auto run = [&](int64_t tile, int thread) {
    const int64_t j = tile % column_tiles, i = tile / column_tiles % row_tiles;
    const int64_t z = tile / column_tiles / row_tiles;
    const int64_t m = i * rows, n = j * columns;
    const dnnl_status_t status = compiled[i == row_tiles - 1][j == column_tiles - 1]->Run(
        thread, At(p.a, z * p.a_batch + m * p.a_row, p.operand),
        At(p.b, z * p.b_batch + n * p.b_column, p.operand),
        p.bias ? At(p.bias, n, p.bias_type) : nullptr,
        const_cast<char*>(At(p.d, z * p.d_batch + m * p.d_row + n, p.result)),
        scratch.as<char>() + scratch_bytes * static_cast<size_t>(thread));
    if (status != dnnl_success) failure = status;
  };
  if (threads == 1) {
    const TeamSize alone(1);
    for (int64_t tile = 0; tile < tiles; ++tile) run(tile, 0);
  } else {
#pragma omp parallel num_threads(threads)
    {
      const TeamSize alone(1);
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = 0; tile < tiles; ++tile) run(tile, omp_get_thread_num());
    }
  }
  if (failure != dnnl_success) FailRun(p, failure);
}

void RunDnnl(const Stream& stream, const Product& p) {
  constexpr int64_t kWideRow = 2048;
  ThreadCache().MakeRoom();
  const bool b_by_rows = p.b_column == 1 && p.b_row == p.n;
  const bool b_by_columns = p.b_row == 1 && p.b_column == p.k;
  // With small pages a team then runs at three quarters of its speed; with large ones it is as
  // fast as tiles, or a little faster where it accumulates.
  const bool unpacked =
      p.operand == DType::kF32 && !b_by_columns && p.n > kWideRow && !p.accumulate;
  const bool team = p.batch == 1 && SupportOf(p.operand) == Support::kPacked && p.a_column == 1 &&
                    p.a_row == p.k && (b_by_rows || b_by_columns) && !unpacked && p.d_row == p.n;
  // Waking a team costs as much as a product of about 10^5 multiplications.
  const bool small = p.batch * p.m * p.n * p.k < 100'000;
  const int threads = small ? 1 : KernelThreads();
  if (team)
    RunTeam(stream, p, threads);
  else
    RunTiles(stream, p, threads);
}

// bf16 where oneDNN has none: blocks converted to f32, multiplied there, converted back.
void RunConverted(const Stream& stream, const Product& p) {
  constexpr int64_t kRows = 256, kColumns = 512;
  const int64_t rows = std::min(p.m, kRows), columns = std::min(p.n, kColumns);
  const Scratch a(stream, sizeof(float) * static_cast<size_t>(rows * p.k));
  const Scratch b(stream, sizeof(float) * static_cast<size_t>(columns * p.k));
  const Scratch d(stream, sizeof(float) * static_cast<size_t>(rows * columns));
  const Scratch bias(stream, sizeof(float) * static_cast<size_t>(columns));
  const int threads = KernelThreads();
  // Copies [outer, inner] with a unit stride inside.
  auto widen = [&](float* to, const BF16* from, int64_t outer, int64_t inner, int64_t step) {
    if (stream.counting()) return;
#pragma omp parallel for num_threads(threads) if (outer * inner > 65536)
    for (int64_t i = 0; i < outer; ++i)
      for (int64_t j = 0; j < inner; ++j)
        to[i * inner + j] = static_cast<float>(from[i * step + j]);
  };
  for (int64_t z = 0; z < p.batch; ++z) {
    for (int64_t n = 0; n < p.n; n += columns) {
      const int64_t nc = std::min(columns, p.n - n);
      const auto* b_from =
          reinterpret_cast<const BF16*>(At(p.b, z * p.b_batch + n * p.b_column, DType::kBF16));
      const bool b_by_rows = p.b_column == 1;
      widen(b.as<float>(), b_from, b_by_rows ? p.k : nc, b_by_rows ? nc : p.k,
            b_by_rows ? p.b_row : p.b_column);
      if (p.bias && !stream.counting()) {
        const char* from = At(p.bias, n, p.bias_type);
        if (p.bias_type == DType::kBF16)
          widen(bias.as<float>(), reinterpret_cast<const BF16*>(from), 1, nc, 0);
        else
          std::memcpy(bias.as<float>(), from, sizeof(float) * static_cast<size_t>(nc));
      }
      for (int64_t m = 0; m < p.m; m += rows) {
        const int64_t mc = std::min(rows, p.m - m);
        const auto* a_from =
            reinterpret_cast<const BF16*>(At(p.a, z * p.a_batch + m * p.a_row, DType::kBF16));
        const bool a_by_rows = p.a_column == 1;
        widen(a.as<float>(), a_from, a_by_rows ? mc : p.k, a_by_rows ? p.k : mc,
              a_by_rows ? p.a_row : p.a_column);
        char* to = const_cast<char*>(At(p.d, z * p.d_batch + m * p.d_row + n, p.result));
        const bool direct = p.result == DType::kF32;
        if (!direct && p.accumulate)
          widen(d.as<float>(), reinterpret_cast<BF16*>(to), mc, nc, p.d_row);
        Product f = p;
        f.batch = 1;
        f.m = mc;
        f.n = nc;
        f.a = a.as<float>();
        f.a_row = a_by_rows ? p.k : 1;
        f.a_column = a_by_rows ? 1 : mc;
        f.b = b.as<float>();
        f.b_row = b_by_rows ? nc : 1;
        f.b_column = b_by_rows ? 1 : p.k;
        f.bias = p.bias ? bias.as<float>() : nullptr;
        f.d = direct ? static_cast<void*>(to) : d.as<void>();
        f.d_row = direct ? p.d_row : nc;
        f.operand = f.result = f.bias_type = DType::kF32;
        RunDnnl(stream, f);
        if (direct || stream.counting()) continue;
#pragma omp parallel for num_threads(threads) if (mc * nc > 65536)
        for (int64_t i = 0; i < mc; ++i)
          for (int64_t j = 0; j < nc; ++j)
            reinterpret_cast<BF16*>(to)[i * p.d_row + j] = BF16(d.as<float>()[i * nc + j]);
      }
    }
  }
}

}  // namespace

void MatmulDnnl(const Stream& stream, const Product& p) {
  if (SupportOf(p.operand) == Support::kNone)
    RunConverted(stream, p);
  else
    RunDnnl(stream, p);
}

}  // namespace shoal::kernels::cpu
