// One declarative list of cases per kernel, used four times: against a definition in double,
// against finite differences, for writes outside the outputs, and as the benchmark. A file
// <kernel>_cases.cc holds a `const CaseFile` and nothing has to know about it:
//
//   const CaseFile kCases([](std::vector<Case>& cases) {
//     for (DType t : kFloats)
//       cases.push_back({.name = fmt::format("Scale/{}", Name(t)),
//                        .args = {Out(t, {3, 65}), In(t, {3, 65})},
//                        .kernel = [](const Stream& s, const Views& a) { Scale(s, a[0], a[1], 2);
//                        }, .reference = [](Arrays& a) { for (int64_t i ...) a[0][i] = 2 * a[1][i];
//                        }});
//   });
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal::kernels::testing {

inline constexpr DType kFloats[] = {DType::kF64, DType::kF32, DType::kBF16};

enum class Role { kIn, kOut, kInOut, kAbsent };

// An argument of a kernel. Outputs hold NaN before the call; so does everything around and between
// the elements of every argument, and those bytes must come back unchanged.
struct Arg {
  Role role = Role::kIn;
  DType dtype = DType::kF32;
  Dims shape;
  Dims strides;                // empty: row-major
  double low = -1, high = 1;   // uniform; for integers inclusive
  std::vector<double> values;  // not empty: these, repeated, instead of random ones
  int alias = -1;              // >= 0: the memory of that argument (an input that may be aliased)

  Arg Strided(Dims s) const { return With(&Arg::strides, s); }
  Arg Range(double lo, double hi) const { return With(&Arg::low, lo).With(&Arg::high, hi); }
  Arg Values(std::vector<double> v) const { return With(&Arg::values, std::move(v)); }
  Arg Aliasing(int arg) const { return With(&Arg::alias, arg); }

 private:
  template <class T>
  Arg With(T Arg::*member, T value) const {
    Arg a = *this;
    a.*member = std::move(value);
    return a;
  }
};
inline Arg In(DType dtype, Dims shape) { return {Role::kIn, dtype, shape}; }
inline Arg Out(DType dtype, Dims shape) { return {Role::kOut, dtype, shape}; }
inline Arg InOut(DType dtype, Dims shape) { return {Role::kInOut, dtype, shape}; }
inline Arg Absent() { return {Role::kAbsent}; }  // becomes View{}

// Strides of `shape` cut out of a tensor that is `extra` wider in dimension `dim`.
Dims PaddedStrides(Dims shape, int64_t extra, int dim = -1);
// Strides of a tensor stored with its last two dimensions exchanged.
Dims TransposedStrides(Dims shape);

// The f64 row-major copy of an argument that references work on.
struct Array {
  Dims shape;
  std::vector<double> v;

  double& operator[](int64_t i) { return v[i]; }
  double operator[](int64_t i) const { return v[i]; }
  template <class... I>
  double& operator()(I... index) {
    return v[Offset({static_cast<int64_t>(index)...})];
  }
  template <class... I>
  double operator()(I... index) const {
    return v[Offset({static_cast<int64_t>(index)...})];
  }
  int64_t dim(int i) const { return shape[i]; }
  int64_t numel() const { return static_cast<int64_t>(v.size()); }

 private:
  int64_t Offset(std::initializer_list<int64_t> index) const {
    int64_t offset = 0;
    int d = 0;
    for (int64_t i : index) offset = offset * shape[d++] + i;
    return offset;
  }
};
using Arrays = std::vector<Array>;
using Views = std::vector<View>;

// |got - want| <= tolerance * (|want| + root mean square of want), by the output's dtype. Zero asks
// for the reference rounded to the dtype, exactly. Infinities and NaN must agree.
struct Tolerance {
  double f64 = 1e-13, f32 = 2e-6, bf16 = 4e-3;
};

// Backward kernels: output `of[i].first` is the derivative of `objective` (in double, of the case's
// arguments; usually the sum of dy times the forward reference) in input `of[i].second`. Checked
// where every float argument is f64; an InOut output is taken as what the call added to it.
struct Gradient {
  std::function<double(const Arrays&)> objective;
  std::vector<std::pair<int, int>> of;
};

struct Case {
  std::string name;  // "RmsNorm/bf16/3x65": the kernel, then what varies
  std::vector<Arg> args;
  std::function<void(const Stream&, const Views&)> kernel;
  std::function<void(Arrays&)> reference;
  // Optional: fills inputs that follow from others, e.g. rstd from x.
  std::function<void(Arrays&)> prepare = nullptr;
  Gradient gradient = {};
  Tolerance tolerance = {};
  double flops = 0;
  double bytes = 0;        // 0: each argument once, InOut twice
  bool benchmark = false;  // is timed by bench/kernels_bench
  bool test = true;        // false: too large for the reference, only timed
};

class CaseFile {
 public:
  explicit CaseFile(void (*fill)(std::vector<Case>&));
};

const std::vector<Case>& AllCases();
std::vector<std::string> KernelNames();  // the first part of the cases' names

// Runs `c` on `device` with 1, 2 and 3 threads, the last with arguments aligned to their element
// only. Returns what is wrong, one line each; empty if nothing.
std::vector<std::string> Check(const Case& c, Device device);

// Arguments in memory, ready to be run again and again.
class PreparedCase {
 public:
  PreparedCase(const Case& c, Device device, bool misaligned);
  ~PreparedCase();
  void Run();  // returns when the kernel is done
  Arrays Values() const;
  std::vector<unsigned char> OutputBytes() const;         // the elements only
  std::vector<std::string> WritesOutsideOutputs() const;  // since construction
  const Arrays& initial() const { return initial_; }

 private:
  void Download() const;

  const Case& case_;
  Stream stream_;
  std::unique_ptr<ScratchSource> scratch_;
  Arrays initial_;
  std::vector<std::shared_ptr<struct Block>> blocks_;
  std::vector<std::vector<char>> before_;  // bytes of the blocks; kept by tests only
  Views views_, host_views_;
};

// Why kernels cannot run on `device` here; empty if they can.
std::string WhyUnavailable(Device device);

}  // namespace shoal::kernels::testing
