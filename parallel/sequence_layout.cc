#include "parallel/sequence_layout.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "core/base/error.h"
#include "parallel/communicator.h"

namespace shoal {
namespace {

constexpr std::array kNames = {"contiguous", "zigzag", "striped"};

int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Query i sees keys j with low < j - i <= high of two ranges; without documents.
struct Band {
  int64_t low, high;
};
constexpr int64_t kUnbounded = int64_t{1} << 60;

Band BandOf(const TokenRange& q, const TokenRange& k, const SequenceMask& mask) {
  const int64_t distance = q.begin - k.begin;
  return {mask.window > 0 ? FloorDiv(distance - mask.window, q.step) : -kUnbounded,
          mask.causal ? FloorDiv(distance, q.step) : kUnbounded};
}

}  // namespace

SequenceLayoutKind ParseSequenceLayout(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return static_cast<SequenceLayoutKind>(i);
  SHOAL_FAIL(ErrorKind::kConfig, "sequence",
             "sequence.layout \"{}\" is none of contiguous, zigzag, striped", name);
}

const char* Name(SequenceLayoutKind kind) { return kNames[static_cast<size_t>(kind)]; }

SequenceLayout::SequenceLayout(SequenceLayoutKind kind, int64_t tokens, int ranks)
    : kind_(kind), tokens_(tokens), ranges_(static_cast<size_t>(ranks)) {
  SHOAL_CHECK(tokens >= 0 && ranks >= 1, "sequence", "{} tokens over {} ranks", tokens, ranks);
  const auto add_part = [&](int rank, int part, int parts) {
    const int64_t begin = ShardBegin(tokens, part, parts);
    Add(rank, begin, ShardBegin(tokens, part + 1, parts) - begin, 1);
  };
  for (int r = 0; r < ranks; ++r) {
    switch (kind) {
      case SequenceLayoutKind::kContiguous:
        add_part(r, r, ranks);
        break;
      case SequenceLayoutKind::kZigzag:
        add_part(r, r, 2 * ranks);
        add_part(r, 2 * ranks - 1 - r, 2 * ranks);
        break;
      case SequenceLayoutKind::kStriped:
        Add(r, r, tokens > r ? (tokens - r + ranks - 1) / ranks : 0, ranks);
        break;
    }
  }
}

SequenceLayout SequenceLayout::Groups(int per_group) const {
  SHOAL_CHECK(per_group >= 1 && ranks() % per_group == 0, "sequence", "groups of {} of {} ranks",
              per_group, ranks());
  // One group has all tokens, in their order.
  if (per_group == ranks()) {
    SequenceLayout one(SequenceLayoutKind::kContiguous, tokens_, 1);
    one.kind_ = kind_;
    return one;
  }
  SequenceLayout groups(kind_, 0, ranks() / per_group);
  groups.tokens_ = tokens_;
  for (int g = 0; g < groups.ranks(); ++g) {
    std::vector<TokenRange> all;
    for (int r = g * per_group; r < (g + 1) * per_group; ++r)
      all.insert(all.end(), ranges(r).begin(), ranges(r).end());
    std::ranges::sort(all, {}, &TokenRange::begin);
    for (const TokenRange& range : all) groups.Add(g, range.begin, range.count, range.step);
  }
  return groups;
}

void SequenceLayout::Add(int rank, int64_t begin, int64_t count, int64_t step) {
  auto& ranges = ranges_[static_cast<size_t>(rank)];
  if (count == 0) return;
  if (!ranges.empty() && step == 1 && ranges.back().begin + ranges.back().count == begin)
    ranges.back().count += count;  // neighbours are one range
  else
    ranges.push_back({begin, count, step, Rows(rank)});
}

int64_t SequenceLayout::Rows(int rank) const {
  const auto own = ranges(rank);
  return own.empty() ? 0 : own.back().row + own.back().count;
}

int64_t SequenceLayout::Token(int rank, int64_t row) const {
  for (const TokenRange& range : ranges(rank))
    if (row < range.row + range.count) return range.Token(row - range.row);
  SHOAL_FAIL(ErrorKind::kBug, "sequence", "rank {} has no row {}", rank, row);
}

std::pair<int, int64_t> SequenceLayout::Place(int64_t token) const {
  for (int r = 0; r < ranks(); ++r)
    for (const TokenRange& range : ranges(r)) {
      const int64_t i = (token - range.begin) / range.step;
      if (token >= range.begin && i < range.count && range.Token(i) == token)
        return {r, range.row + i};
    }
  SHOAL_FAIL(ErrorKind::kBug, "sequence", "no token {} among {}", token, tokens_);
}

std::vector<int64_t> SequenceLayout::Tokens(int rank) const {
  std::vector<int64_t> tokens;
  for (const TokenRange& range : ranges(rank))
    for (int64_t i = 0; i < range.count; ++i) tokens.push_back(range.Token(i));
  return tokens;
}

std::optional<TileRows> NeededRows(const TokenRange& q, const TokenRange& k,
                                   const SequenceMask& mask, int64_t tokens) {
  const auto [low, high] = BandOf(q, k, mask);
  if (low >= high) return std::nullopt;
  int64_t q_begin = std::max<int64_t>(0, -high);
  int64_t q_end = std::min(q.count, k.count - 1 - low);
  if (q_begin >= q_end) return std::nullopt;
  int64_t k_begin = std::max<int64_t>(0, q_begin + low + 1);
  int64_t k_end = std::min(k.count, q_end + high);
  if (k_begin >= k_end) return std::nullopt;
  if (mask.documents.empty()) return TileRows{q_begin, q_end - q_begin, k_begin, k_end - k_begin};

  // The hull of what some sequence of the batch needs.
  const int64_t first = q_begin, last = q_end;
  const int64_t key_first = k_begin, key_last = k_end;
  q_begin = q.count, q_end = 0, k_begin = k.count, k_end = 0;
  const auto batch = static_cast<int64_t>(mask.documents.size()) / std::max<int64_t>(1, tokens);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* documents = mask.documents.data() + b * tokens;
    std::unordered_map<int32_t, std::pair<int64_t, int64_t>> keys;  // document -> first, last
    for (int64_t j = key_first; j < key_last; ++j) {
      const auto [place, added] = keys.try_emplace(documents[k.Token(j)], j, j);
      if (!added) place->second.second = j;
    }
    for (int64_t i = first; i < last; ++i) {
      const auto found = keys.find(documents[q.Token(i)]);
      if (found == keys.end()) continue;
      const int64_t from = std::max(found->second.first, i + low + 1);
      const int64_t to = std::min(found->second.second, i + high);
      if (from > to) continue;
      q_begin = std::min(q_begin, i), q_end = std::max(q_end, i + 1);
      k_begin = std::min(k_begin, from), k_end = std::max(k_end, to + 1);
    }
  }
  if (q_begin >= q_end) return std::nullopt;
  return TileRows{q_begin, q_end - q_begin, k_begin, k_end - k_begin};
}

std::optional<kernels::AttentionOptions> TileMask(const TokenRange& q, const TokenRange& k,
                                                  const SequenceMask& mask) {
  const auto [low, high] = BandOf(q, k, mask);
  if (low >= high) return std::nullopt;
  kernels::AttentionOptions options;
  options.causal = mask.causal;
  if (mask.causal) options.query_offset = high;
  if (mask.window > 0) {
    // A key is seen if j > i + query_offset - window.
    if (!mask.causal) options.query_offset = low + 1;
    options.window = options.query_offset - low;
  }
  return options;
}

int64_t VisiblePairs(const TokenRange& q, const TokenRange& k, const SequenceMask& mask) {
  // Pairs with j - i <= h: query i has min(max(i + h + 1, 0), keys) of them.
  const auto up_to = [&](int64_t h) {
    const int64_t first = std::clamp<int64_t>(-h, 0, q.count);
    const int64_t full = std::clamp<int64_t>(k.count - h - 1, first, q.count);
    const int64_t some = full - first;
    const int64_t least = some > 0 ? first + h + 1 : 0;
    return some * least + some * (some - 1) / 2 + (q.count - full) * k.count;
  };
  const auto [low, high] = BandOf(q, k, mask);
  return low < high ? up_to(high) - up_to(low) : 0;
}

}  // namespace shoal
