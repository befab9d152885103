// Several contiguous arrays of one dtype, taken as one.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "core/base/view.h"

namespace shoal {

inline int64_t Elements(std::span<const View> pieces) {
  int64_t n = 0;
  for (const View& piece : pieces) n += piece.numel();
  return n;
}

// Elements [begin, begin + count) of a contiguous array.
inline View Part(const View& array, int64_t begin, int64_t count) {
  const int64_t at = begin * static_cast<int64_t>(SizeOf(array.dtype));
  return {array.as<char>() + at, array.dtype, {count}, array.device};
}

inline int64_t LongestShare(std::span<const int64_t> bounds) {
  int64_t longest = 0;
  for (size_t r = 1; r < bounds.size(); ++r) longest = std::max(longest, bounds[r] - bounds[r - 1]);
  return longest;
}
// Elements of rank r's share that lie in its [at, at + part).
inline int64_t PartOf(std::span<const int64_t> bounds, int r, int64_t at, int64_t part) {
  const int64_t share = bounds[static_cast<size_t>(r) + 1] - bounds[static_cast<size_t>(r)];
  return std::clamp<int64_t>(share - at, 0, part);
}

// Where the elements [begin, end) of the pieces' concatenation lie: f(piece, first, count).
template <class F>
void ForRange(std::span<const View> pieces, int64_t begin, int64_t end, F&& f) {
  int64_t at = 0;
  for (size_t p = 0; p < pieces.size(); ++p) {
    const int64_t n = pieces[p].numel();
    const int64_t from = std::max(begin, at), to = std::min(end, at + n);
    if (from < to) f(p, from - at, to - from);
    at += n;
  }
}

// Walks a range of the concatenation of several arrays.
class Cursor {
 public:
  Cursor(std::span<const View> pieces, int64_t begin = 0)
      : pieces_(pieces), width_(static_cast<int64_t>(SizeOf(pieces[0].dtype))), at_(begin) {
    SkipEnds();
  }

  // Calls f(memory, offset in bytes within these n elements, bytes) for the next n elements.
  template <class F>
  void Move(int64_t n, F&& f) {
    for (int64_t done = 0; done < n;) {
      const int64_t count = std::min(n - done, pieces_[piece_].numel() - at_);
      f(pieces_[piece_].as<char>() + at_ * width_, done * width_, count * width_);
      done += count;
      at_ += count;
      SkipEnds();
    }
  }
  void Skip(int64_t n) {
    Move(n, [](char*, int64_t, int64_t) {});
  }
  void CopyOut(int64_t n, const char* from) {
    Move(n, [&](char* memory, int64_t at, int64_t bytes) {
      std::memcpy(memory, from + at, static_cast<size_t>(bytes));
    });
  }
  void CopyIn(int64_t n, char* to) {
    Move(n, [&](const char* memory, int64_t at, int64_t bytes) {
      std::memcpy(to + at, memory, static_cast<size_t>(bytes));
    });
  }

 private:
  void SkipEnds() {
    while (piece_ < pieces_.size() && at_ >= pieces_[piece_].numel()) {
      at_ -= pieces_[piece_].numel();
      ++piece_;
    }
  }
  std::span<const View> pieces_;
  int64_t width_;
  size_t piece_ = 0;
  int64_t at_;
};

}  // namespace shoal
