// What the attention kernels of every instruction set share: the problem, how it is cut into units
// of work, and the scratch memory of a unit.
//
// The query and key axes are cut at fixed places: blocks of kQueryBlock queries and tiles of
// kKeyTile keys. Every sum runs over tiles or blocks in ascending order, so a result does not
// depend on which unit computed it, and units can follow the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/base/view.h"
#include "kernels/attention.h"

namespace shoal::kernels::cpu {

constexpr int64_t kGroup = 6;          // rows of a register tile
constexpr int64_t kQueryBlock = 96;    // a multiple of kGroup and of 16, the widest vector
constexpr int64_t kKeyTile = 192;      // a multiple of 2 kGroup
constexpr int64_t kHeadMultiple = 16;  // head dims are padded to this

constexpr int64_t RoundDown(int64_t n, int64_t unit) {
  return n >= 0 ? n / unit * unit : -((-n + unit - 1) / unit * unit);
}
constexpr int64_t RoundUp(int64_t n, int64_t unit) { return RoundDown(n + unit - 1, unit); }

struct AttentionProblem {
  View out, lse, q, k, v, q_document, k_document;
  View dq, dk, dv, dout, delta;  // backward only
  bool add = false;              // to dq, dk and dv, which are then as wide as sums
  AttentionOptions options;
  int64_t batch = 0, queries = 0, keys = 0, heads = 0, kv_heads = 0, head_dim = 0;
  // Rows of scores per query: more than one where a few queries of several heads, which share their
  // keys, are worked on together. Row r is query r / fold of the head r % fold.
  int64_t fold = 1;

  int64_t group() const { return heads / kv_heads; }  // query heads per kv head
  bool drops() const { return options.dropout.p > 0; }
  bool documents() const { return static_cast<bool>(q_document); }
  int64_t padded_head() const { return RoundUp(head_dim, kHeadMultiple); }
  int64_t QueryOf(int64_t row) const { return fold == 1 ? row : RoundDown(row, fold) / fold; }

  // Without documents, row r sees exactly the keys [FirstKey(r), LastKey(r)], and key j is seen by
  // exactly the rows [FirstRow(j), LastRow(j)], all clipped to those that there are. Both ends grow
  // with r and j.
  int64_t FirstKey(int64_t r) const {
    return options.window > 0
               ? std::max<int64_t>(0, QueryOf(r) + options.query_offset - options.window + 1)
               : 0;
  }
  int64_t LastKey(int64_t r) const {
    return options.causal ? std::min(keys - 1, QueryOf(r) + options.query_offset) : keys - 1;
  }
  int64_t FirstRow(int64_t j) const {
    return options.causal ? std::max<int64_t>(0, j - options.query_offset) * fold : 0;
  }
  int64_t LastRow(int64_t j) const {
    const int64_t last = options.window > 0
                             ? std::min(queries - 1, j - options.query_offset + options.window - 1)
                             : queries - 1;
    return last * fold + fold - 1;
  }
  // The keys that rows [first, last] see, in whole groups.
  int64_t KeysBegin(int64_t first) const { return RoundDown(FirstKey(first), kGroup); }
  int64_t KeysEnd(int64_t last) const {
    return RoundUp(std::max<int64_t>(0, LastKey(last) + 1), kGroup);
  }
};

// One thread's piece: these query heads of one kv head, these queries, these keys.
struct AttentionUnit {
  int64_t batch, kv_head, head_begin, head_end;
  int64_t query_begin, query_end;  // starts at a multiple of kQueryBlock
  int64_t key_begin, key_end;      // starts at a multiple of kKeyTile; backward only
  bool dq, dkv;                    // backward: which gradients it writes
  // Forward: one block of rows, all its heads folded into it, that packs keys tile by tile instead
  // of all of them ahead of several blocks.
  bool streamed;
};

// Hands out pieces of a block, or measures how large it has to be when begin is null.
class Carver {
 public:
  explicit Carver(char* begin) : begin_(begin) {}
  template <class T>
  T* Take(int64_t count) {
    T* p = begin_ ? reinterpret_cast<T*>(begin_ + used_) : nullptr;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

}  // namespace shoal::kernels::cpu
