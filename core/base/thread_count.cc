#include "core/base/thread_count.h"

#include <omp.h>

namespace shoal {

int KernelThreads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }
void SetKernelThreads(int n) { omp_set_num_threads(n); }

}  // namespace shoal
