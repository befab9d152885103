// Which tokens of a sequence each rank of a sequence-parallel group holds, and which queries of one
// rank see which keys of another. Any number of tokens over any number of ranks: shares are equal
// but for rounding, and may be empty.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/attention.h"

namespace shoal {

enum class SequenceLayoutKind {
  kContiguous,  // rank r has the r-th of P parts
  kZigzag,      // parts r and 2P-1-r of 2P: under a causal mask all have equally much to do
  kStriped,     // tokens r, r + P, r + 2P, ...
};
SequenceLayoutKind ParseSequenceLayout(std::string_view name);  // "contiguous", "zigzag", "striped"
const char* Name(SequenceLayoutKind kind);

// Tokens begin, begin + step, ..., `count` of them: the rows [row, row + count) of their rank.
struct TokenRange {
  int64_t begin, count, step, row;
  int64_t Token(int64_t i) const { return begin + i * step; }
  TokenRange Part(int64_t first, int64_t n) const {
    return {begin + first * step, n, step, row + first};
  }
};

class SequenceLayout {
 public:
  SequenceLayout(SequenceLayoutKind kind, int64_t tokens, int ranks);
  SequenceLayoutKind kind() const { return kind_; }
  int64_t tokens() const { return tokens_; }
  int ranks() const { return static_cast<int>(ranges_.size()); }
  // The same tokens over groups of `per_group` ranks in a row, which must divide the ranks: a group
  // has its ranks' rows, in ascending order of its ranges' first tokens.
  SequenceLayout Groups(int per_group) const;
  // In ascending order of tokens, and so of rows. None is empty. A group's stripes lie one after
  // the other.
  std::span<const TokenRange> ranges(int rank) const { return ranges_[static_cast<size_t>(rank)]; }
  int64_t Rows(int rank) const;
  int64_t Token(int rank, int64_t row) const;
  std::pair<int, int64_t> Place(int64_t token) const;  // rank, row
  // Of the rank's rows, in order: its positions in the sequence.
  std::vector<int64_t> Tokens(int rank) const;

 private:
  void Add(int rank, int64_t begin, int64_t count, int64_t step);

  SequenceLayoutKind kind_;
  int64_t tokens_;
  std::vector<std::vector<TokenRange>> ranges_;
};

// Who sees whom; positions are token numbers.
struct SequenceMask {
  bool causal = true;
  int64_t window = 0;              // > 0: only keys behind token - window
  std::vector<int32_t> documents;  // [batch, tokens] by token; empty: each sequence is one document
};

// The queries and keys of two ranges of one layout that matter to each other: rows [q_first,
// q_first + q_count) of the one, [k_first, ..) of the other. With documents of many runs it may
// hold more than is needed.
struct TileRows {
  int64_t q_first, q_count, k_first, k_count;
};
std::optional<TileRows> NeededRows(const TokenRange& q, const TokenRange& k,
                                   const SequenceMask& mask, int64_t tokens);

// The same mask for the attention kernel, whose query i and key j are Token(i) and Token(j) of
// these ranges. Nothing if the mask without documents shows no query any key.
std::optional<kernels::AttentionOptions> TileMask(const TokenRange& q, const TokenRange& k,
                                                  const SequenceMask& mask);

// How many (query, key) pairs the mask without documents shows.
int64_t VisiblePairs(const TokenRange& q, const TokenRange& k, const SequenceMask& mask);

}  // namespace shoal
