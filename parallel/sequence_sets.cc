#include "parallel/sequence_sets.h"

#include <algorithm>

namespace shoal {
namespace {

// The smallest rows that hold both; of one range.
SequenceRows Hull(const SequenceRows& a, const SequenceRows& b) {
  const int64_t first = std::min(a.first, b.first);
  return {a.range, first, std::max(a.first + a.count, b.first + b.count) - first};
}

}  // namespace

void Include(SequenceRowSet& rows, const SequenceRows& more) {
  for (SequenceRows& r : rows)
    if (r.range == more.range) {
      r = Hull(r, more);
      return;
    }
  rows.push_back(more);
  std::ranges::sort(rows, {}, &SequenceRows::range);
}

SequenceRowSet Intersection(const SequenceRowSet& a, const SequenceRowSet& b) {
  SequenceRowSet common;
  for (const SequenceRows& x : a)
    for (const SequenceRows& y : b) {
      const int64_t first = std::max(x.first, y.first);
      const int64_t end = std::min(x.first + x.count, y.first + y.count);
      if (x.range == y.range && first < end) common.push_back({x.range, first, end - first});
    }
  return common;
}

SequenceRowSet Difference(const SequenceRowSet& a, const SequenceRowSet& b) {
  SequenceRowSet rest;
  for (const SequenceRows& x : a) {
    int64_t first = x.first;
    const int64_t end = x.first + x.count;
    for (const SequenceRows& y : b) {
      if (y.range != x.range) continue;
      const int64_t until = std::min(end, y.first);
      if (until > first) rest.push_back({x.range, first, until - first});
      first = std::max(first, y.first + y.count);
    }
    if (first < end) rest.push_back({x.range, first, end - first});
  }
  return rest;
}

int64_t Count(const SequenceRowSet& rows) {
  int64_t n = 0;
  for (const SequenceRows& r : rows) n += r.count;
  return n;
}

bool Inside(const SequenceRows& rows, const SequenceRows& all) {
  return rows.range == all.range && rows.first >= all.first &&
         rows.first + rows.count <= all.first + all.count;
}

bool Overlap(const SequenceRows& a, const SequenceRows& b) {
  return a.range == b.range && a.first < b.first + b.count && b.first < a.first + a.count;
}

}  // namespace shoal
