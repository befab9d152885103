// Sets of an owner's rows: runs of its ranges, apart and in ascending order.
#pragma once

#include <vector>

#include "parallel/sequence_schedule.h"

namespace shoal {

using SequenceRowSet = std::vector<SequenceRows>;

// Of at most one run of each range: the run grows to hold `more`, and what lies between.
void Include(SequenceRowSet& rows, const SequenceRows& more);
SequenceRowSet Intersection(const SequenceRowSet& a, const SequenceRowSet& b);
SequenceRowSet Difference(const SequenceRowSet& a, const SequenceRowSet& b);  // a without b
int64_t Count(const SequenceRowSet& rows);

bool Inside(const SequenceRows& rows, const SequenceRows& all);
bool Overlap(const SequenceRows& a, const SequenceRows& b);

}  // namespace shoal
