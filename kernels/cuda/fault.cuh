// Device side of the fault record.
#pragma once

#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/handles.h"

namespace shoal::kernels::cuda {

__device__ __forceinline__ void ReportFault(FaultRecord* record, const char* op, bool is_label,
                                            int64_t row, int64_t value, int64_t limit) {
  if (atomicCAS(&record->claimed, 0, 1) != 0) return;
  record->op = op;
  record->is_label = is_label;
  record->row = row;
  record->value = value;
  record->limit = limit;
  __threadfence_system();
  record->ready = 1;
}

template <class A>
__device__ __forceinline__ A NotANumber() {
  return static_cast<A>(__int_as_float(0x7fc00000));
}

}  // namespace shoal::kernels::cuda
