#include "tests/kernels/harness.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/base/build_config.h"
#include "core/base/philox.h"
#include "core/base/thread_count.h"
#include "kernels/cuda_runtime.h"

namespace shoal::kernels::testing {
namespace {

constexpr size_t kGuard = 256;  // bytes of NaN before and after everything
constexpr size_t kHugePage = 2 << 20;
constexpr int64_t kPeriod = 65521;  // random values repeat after a prime number of elements

}  // namespace

// Memory of one argument or scratch block, with its copy on the host; on the CPU the two are one.
struct Block {
  size_t bytes;
  void* stream;  // null on the CPU
  char* host;
  char* device;
  bool used = true;

  Block(size_t bytes, const Stream& on) : bytes(bytes), stream(on.handle) {
    const size_t unit = bytes < kHugePage ? 64 : kHugePage;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    host = device = static_cast<char*>(std::aligned_alloc(unit, rounded));
    SHOAL_CHECK(host, "harness", "no memory for {} bytes", bytes);
    if (unit == kHugePage) madvise(host, rounded, MADV_HUGEPAGE);
    std::memset(host, 0xff, bytes);
    if constexpr (kHaveCuda) {
      if (stream) device = static_cast<char*>(shoal::cuda::Allocate(on.device.index, bytes));
      SHOAL_CHECK(device, "harness", "no memory for {} bytes on the device", bytes);
    }
  }
  ~Block() {
    if constexpr (kHaveCuda) {
      if (stream) shoal::cuda::Free(device);
    }
    std::free(host);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void Upload() {
    if constexpr (kHaveCuda) {
      if (stream) shoal::cuda::CopyToDevice(stream, device, host, bytes);
    }
  }
  void Download() {
    if constexpr (kHaveCuda) {
      if (!stream) return;
      shoal::cuda::CopyToHost(stream, host, device, bytes);
      shoal::cuda::Synchronize(stream);
    }
  }
};

namespace {

// Scratch with NaN in it and around it. Keeps its blocks, so that a benchmark times no page faults.
class GuardedScratch : public ScratchSource {
 public:
  explicit GuardedScratch(const Stream& stream) : stream_(stream) {}

  void* AllocateScratch(size_t bytes) override {
    for (auto& b : blocks_)
      if (!b->used && b->bytes == bytes + 2 * kGuard) return b->used = true, b->device + kGuard;
    blocks_.push_back(std::make_unique<Block>(bytes + 2 * kGuard, stream_));
    blocks_.back()->Upload();
    return blocks_.back()->device + kGuard;
  }
  void FreeScratch(void* data) override {
    for (auto& b : blocks_)
      if (b->device + kGuard == data) b->used = false;
  }
  void Report(std::vector<std::string>& out) const {
    for (const auto& b : blocks_) {
      if (b->used) out.push_back("scratch is not freed");
      b->Download();
      const auto nan = [](char c) { return c == '\xff'; };
      const char *begin = b->host, *end = begin + b->bytes;
      if (!std::all_of(begin, begin + kGuard, nan) || !std::all_of(end - kGuard, end, nan))
        out.push_back("writes outside its scratch memory");
    }
  }

 private:
  const Stream& stream_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

// Calls f(i, offset) for every element in row-major order.
template <class F>
void ForEachElement(const View& v, F f) {
  Dims index = v.shape;
  for (int d = 0; d < v.rank(); ++d) index[d] = 0;
  int64_t offset = 0;
  for (int64_t i = 0, n = v.numel(); i < n; ++i) {
    f(i, offset);
    for (int d = v.rank() - 1; d >= 0; --d) {
      offset += v.strides[d];
      if (++index[d] < v.shape[d]) break;
      offset -= index[d] * v.strides[d];
      index[d] = 0;
    }
  }
}

void Store(const View& to, const std::vector<double>& from) {
  VisitAny(to.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    ForEachElement(to, [&](int64_t i, int64_t o) { to.as<T>()[o] = static_cast<T>(from[i]); });
  });
}

std::vector<double> Load(const View& from) {
  std::vector<double> to(from.numel());
  VisitAny(from.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    ForEachElement(from,
                   [&](int64_t i, int64_t o) { to[i] = static_cast<double>(from.as<T>()[o]); });
  });
  return to;
}

double Round(double value, DType dtype) {
  return VisitAny(dtype, [&](auto tag) {
    return static_cast<double>(static_cast<typename decltype(tag)::type>(value));
  });
}

Array InitialValues(const Arg& arg, uint64_t seed) {
  Array a{arg.shape, std::vector<double>(arg.role == Role::kAbsent ? 0 : arg.shape.numel())};
  if (arg.role != Role::kIn && arg.role != Role::kInOut) return a;
  std::vector<double> values = arg.values;
  if (values.empty()) {
    values.resize(std::clamp<int64_t>(a.numel(), 1, kPeriod));
    for (size_t i = 0; i < values.size(); ++i) {
      const double u = UniformFromWord(PhiloxWord({seed, 0}, i));
      values[i] = IsFloat(arg.dtype) ? arg.low + u * (arg.high - arg.low)
                                     : std::floor(arg.low + u * (arg.high - arg.low + 1));
    }
  }
  for (double& v : values) v = Round(v, arg.dtype);
  for (int64_t i = 0; i < a.numel(); ++i) a[i] = values[i % values.size()];
  return a;
}

double ToleranceFor(const Case& c, DType dtype) {
  if (!IsFloat(dtype)) return 0;
  if (SizeOf(dtype) == 2) return c.tolerance.bf16;
  return dtype == DType::kF64 ? c.tolerance.f64 : c.tolerance.f32;
}

// The worst element of `got` against `want`, as a line; empty if all are within `tolerance`.
std::string Compare(const std::vector<double>& got, const std::vector<double>& want,
                    double tolerance) {
  double squares = 0;
  for (double w : want) squares += std::isfinite(w) ? w * w : 0;
  const double rms = std::sqrt(squares / std::max<size_t>(1, want.size()));
  double worst = 0;
  size_t at = 0, bad = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    const double error = std::abs(got[i] - want[i]);
    if (error <= tolerance * (std::abs(want[i]) + rms) && std::isfinite(want[i])) continue;
    ++bad;
    if (!(error <= worst)) worst = error, at = i;
  }
  if (!bad) return "";
  return fmt::format(
      "{} of {} elements differ; worst at {}: got {:.17g}, want {:.17g} (rms {:.3g})", bad,
      want.size(), at, got[at], want[at], rms);
}

void CheckGradient(const Case& c, const Arrays& before, const Arrays& after,
                   std::vector<std::string>& out) {
  for (const auto& [output, input] : c.gradient.of) {
    Arrays a = before;
    std::vector<double> got, want;
    const int64_t n = a[input].numel(), step = std::max<int64_t>(1, n / 48);
    for (int64_t i = 0; i < n; i += step) {
      const double x = a[input][i], h = 1e-5 * std::max(1.0, std::abs(x));
      const auto at = [&](double value) { return a[input][i] = value, c.gradient.objective(a); };
      want.push_back((at(x + h) - at(x - h)) / (2 * h));
      a[input][i] = x;
      const bool added = c.args[output].role == Role::kInOut;
      got.push_back(after[output][i] - (added ? before[output][i] : 0));
    }
    if (std::string line = Compare(got, want, 1e-6); !line.empty())
      out.push_back(fmt::format("gradient in argument {}: {}", input, line));
  }
}

std::vector<void (*)(std::vector<Case>&)>& CaseFiles() {
  static std::vector<void (*)(std::vector<Case>&)> files;
  return files;
}

}  // namespace

Dims PaddedStrides(Dims shape, int64_t extra, int dim) {
  shape[dim] += extra;
  return shape.RowMajorStrides();
}

Dims TransposedStrides(Dims shape) {
  std::swap(shape[-1], shape[-2]);
  Dims strides = shape.RowMajorStrides();
  std::swap(strides[-1], strides[-2]);
  return strides;
}

PreparedCase::PreparedCase(const Case& c, Device device, bool misaligned)
    : case_(c), stream_{device}, scratch_(std::make_unique<GuardedScratch>(stream_)) {
  stream_.scratch = scratch_.get();
  if constexpr (kHaveCuda) {
    if (device.type == DeviceType::kCuda) stream_.handle = shoal::cuda::CreateStream(device.index);
  }
  for (const Arg& arg : c.args)
    initial_.push_back(InitialValues(arg, HashName(c.name) + initial_.size()));
  if (c.prepare) {
    c.prepare(initial_);
    for (size_t i = 0; i < c.args.size(); ++i)
      for (double& v : initial_[i].v) v = Round(v, c.args[i].dtype);
  }
  before_.resize(c.args.size());
  for (size_t i = 0; i < c.args.size(); ++i) {
    const Arg& arg = c.args[i];
    if (arg.role == Role::kAbsent || arg.alias >= 0) {
      blocks_.push_back(arg.alias >= 0 ? blocks_[arg.alias] : nullptr);
      host_views_.push_back(arg.alias >= 0 ? host_views_[arg.alias] : View{});
      views_.push_back(arg.alias >= 0 ? views_[arg.alias] : View{});
      continue;
    }
    View view(nullptr, arg.dtype, arg.shape, device);
    if (arg.strides.rank()) view.strides = arg.strides;
    size_t elements = view.numel() > 0;
    for (int d = 0; d < view.rank() && elements; ++d)
      elements += (view.shape[d] - 1) * view.strides[d];
    const size_t start = kGuard + (misaligned ? SizeOf(arg.dtype) : 0);
    const auto block = std::make_shared<Block>(elements * SizeOf(arg.dtype) + 2 * start, stream_);
    view.data = block->host + start;
    host_views_.push_back(view);
    if (arg.role != Role::kOut) {
      Store(view, initial_[i].v);
      initial_[i].v = Load(view);  // with a stride of 0 the last value of an element counts
    }
    if (c.test) before_[i].assign(block->host, block->host + block->bytes);
    block->Upload();
    view.data = block->device + start;
    views_.push_back(view);
    blocks_.push_back(block);
  }
}

PreparedCase::~PreparedCase() {
  blocks_.clear();
  scratch_.reset();
  if constexpr (kHaveCuda) {
    if (stream_.handle) shoal::cuda::DestroyStream(stream_.handle);
  }
}

void PreparedCase::Run() {
  case_.kernel(stream_, views_);
  if constexpr (kHaveCuda) {
    if (stream_.handle) shoal::cuda::Synchronize(stream_.handle);
  }
}

void PreparedCase::Download() const {
  for (const auto& block : blocks_)
    if (block) block->Download();
}

Arrays PreparedCase::Values() const {
  Download();
  Arrays values = initial_;
  for (size_t i = 0; i < host_views_.size(); ++i)
    if (host_views_[i]) values[i].v = Load(host_views_[i]);
  return values;
}

std::vector<unsigned char> PreparedCase::OutputBytes() const {
  Download();
  std::vector<unsigned char> bytes;
  for (size_t i = 0; i < host_views_.size(); ++i) {
    const View& view = host_views_[i];
    if (!view || case_.args[i].role == Role::kIn) continue;
    const size_t size = SizeOf(view.dtype);
    ForEachElement(view, [&](int64_t, int64_t offset) {
      const auto* p = view.as<unsigned char>() + offset * size;
      bytes.insert(bytes.end(), p, p + size);
    });
  }
  return bytes;
}

std::vector<std::string> PreparedCase::WritesOutsideOutputs() const {
  Download();
  std::vector<std::string> out;
  for (size_t i = 0; i < before_.size(); ++i) {
    if (before_[i].empty()) continue;
    std::vector<char> now(blocks_[i]->host, blocks_[i]->host + blocks_[i]->bytes);
    for (size_t j = 0; j < before_.size(); ++j) {  // forget what the kernel may write
      if (blocks_[j] != blocks_[i] || case_.args[j].role == Role::kIn) continue;
      const size_t start = host_views_[i].as<char>() - blocks_[i]->host;
      const size_t size = SizeOf(host_views_[i].dtype);
      ForEachElement(host_views_[i], [&](int64_t, int64_t offset) {
        std::memcpy(&now[start + offset * size], &before_[i][start + offset * size], size);
      });
    }
    if (now != before_[i])
      out.push_back(fmt::format("changes bytes of argument {} that are not its to write", i));
  }
  static_cast<const GuardedScratch&>(*scratch_).Report(out);
  return out;
}

CaseFile::CaseFile(void (*fill)(std::vector<Case>&)) { CaseFiles().push_back(fill); }

const std::vector<Case>& AllCases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> all;
    for (auto* fill : CaseFiles()) fill(all);
    return all;
  }();
  return cases;
}

std::vector<std::string> KernelNames() {
  std::vector<std::string> names;
  for (const Case& c : AllCases()) names.push_back(c.name.substr(0, c.name.find('/')));
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

std::vector<std::string> Check(const Case& c, Device device) {
  std::vector<std::string> problems;
  std::vector<unsigned char> first;
  const int threads_before = KernelThreads();
  for (int threads = 1; threads <= 3 && problems.empty(); ++threads) {
    SetKernelThreads(threads);
    PreparedCase run(c, device, /*misaligned=*/threads == 3);
    run.Run();
    problems = run.WritesOutsideOutputs();
    if (threads > 1) {
      if (run.OutputBytes() != first)
        problems.push_back(fmt::format("{} threads{} give other bits than one", threads,
                                       threads == 3 ? " or another alignment" : ""));
      continue;
    }
    first = run.OutputBytes();
    const Arrays got = run.Values();
    Arrays want = run.initial();
    c.reference(want);
    bool all_f64 = true;
    for (size_t i = 0; i < c.args.size(); ++i) {
      const Arg& arg = c.args[i];
      if (arg.role == Role::kAbsent) continue;
      all_f64 = all_f64 && (!IsFloat(arg.dtype) || arg.dtype == DType::kF64);
      if (arg.role == Role::kIn) continue;
      const double tolerance = ToleranceFor(c, arg.dtype);
      if (tolerance == 0)
        for (double& v : want[i].v) v = Round(v, arg.dtype);
      if (std::string line = Compare(got[i].v, want[i].v, tolerance); !line.empty())
        problems.push_back(fmt::format("argument {}: {}", i, line));
    }
    if (c.gradient.objective && all_f64) CheckGradient(c, run.initial(), got, problems);
  }
  SetKernelThreads(threads_before);
  return problems;
}

std::string WhyUnavailable(Device device) {
  if (device.type == DeviceType::kCpu) return "";
  if constexpr (kHaveCuda) {
    return shoal::cuda::DeviceCount() > device.index ? "" : "no CUDA device here";
  }
  return "built without CUDA";
}

}  // namespace shoal::kernels::testing
