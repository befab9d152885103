// The instruction-set specific half of attention, as attention.cc calls it.
#pragma once

#include "kernels/cpu/attention_plan.h"

namespace shoal::kernels::cpu {

// `pairs`: bf16 goes through the dot product instruction where it is compiled in. `keys`: how many
// keys a unit packs at a time. Scratch is in bytes, for one unit.
int64_t AttentionScratch(const AttentionProblem& a, bool pairs, int64_t keys);
void RunAttentionUnit(const AttentionProblem& a, bool pairs, int64_t keys, const AttentionUnit& u,
                      char* scratch);

int64_t AttentionBackwardScratch(const AttentionProblem& a, bool pairs, int64_t keys);
void RunAttentionBackwardUnit(const AttentionProblem& a, bool pairs, int64_t keys,
                              const AttentionUnit& u, char* scratch);

}  // namespace shoal::kernels::cpu
