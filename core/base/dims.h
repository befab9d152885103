// Shapes and strides: a short inlined list of int64, in elements.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/base/error.h"

namespace shoal {

class Dims {
 public:
  static constexpr int kMaxRank = 6;

  Dims() = default;
  Dims(std::initializer_list<int64_t> values) {  // NOLINT: shapes are written as {B, T, D}
    for (int64_t v : values) push_back(v);
  }

  int rank() const { return rank_; }
  // Negative indices count from the end, as in shape[-1].
  int64_t operator[](int i) const { return values_[i < 0 ? i + rank_ : i]; }
  int64_t& operator[](int i) { return values_[i < 0 ? i + rank_ : i]; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + rank_; }
  void push_back(int64_t v) {
    SHOAL_CHECK(rank_ < kMaxRank, "shape", "more than {} dimensions", kMaxRank);
    values_[rank_++] = v;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t v : *this) n *= v;
    return n;
  }
  bool operator==(const Dims& o) const {
    if (rank_ != o.rank_) return false;
    for (int i = 0; i < rank_; ++i)
      if (values_[i] != o.values_[i]) return false;
    return true;
  }
  // Strides of a row-major tensor of this shape.
  Dims RowMajorStrides() const {
    Dims s;
    s.rank_ = rank_;
    int64_t step = 1;
    for (int i = rank_ - 1; i >= 0; --i) {
      s.values_[i] = step;
      step *= values_[i];
    }
    return s;
  }
  std::string ToString() const {
    std::string s = "[";
    for (int i = 0; i < rank_; ++i) s += fmt::format("{}{}", i ? ", " : "", values_[i]);
    return s + "]";
  }

 private:
  int rank_ = 0;
  int64_t values_[kMaxRank] = {};
};

}  // namespace shoal
