// Known bugs of other systems, which a test puts in to see that the suite notices. Off unless a
// test turns one on; a program never does.
#pragma once

#include <atomic>

namespace shoal {

enum class Mutation {
  kNone,
  kMeanOfMicroBatchMeans,       // the loss is normalised per micro-batch and rank
  kLastMicroBatchOnly,          // sharded gradients keep the last micro-batch's share
  kNormOfTheLocalShard,         // clipping sees this rank's part of the gradient
  kPartialTakenForWhole,        // a column-parallel input's gradient is not summed
  kBiasOnEveryRank,             // a row-parallel bias is added by each
  kSharedHeadNotSummed,         // a kv head that ranks share takes one rank's gradient
  kNormWeightNotSummed,         // a gain that each rank uses on its tokens takes one's gradient
  kVocabularyRemainderDropped,  // rows beyond a multiple of the ranks belong to nobody
  kStatisticsOfTheTile,         // attention's backward takes a tile's lse for the whole's
  kFirstKeysReused,             // a ring goes on computing with the keys that came first
  kPartMergedTwice,             // a partial result of attention counts twice
  // No bugs, but what a run may meet: of a batch that holds a poisoned token
  kInfiniteLoss,
  kInfiniteUpdate,
};

inline std::atomic<Mutation> active_mutation = Mutation::kNone;
// Poisoned tokens, by Batch::token_numbers: the first, and how many.
inline std::atomic<int64_t> poisoned_token = 0, poisoned_tokens = 1;
inline bool Mutated(Mutation m) { return active_mutation.load(std::memory_order_relaxed) == m; }

}  // namespace shoal
