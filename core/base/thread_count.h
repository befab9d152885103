// How many threads a CPU kernel started from this thread uses. Ranks as threads each have their
// own.
#pragma once

namespace shoal {

int KernelThreads();           // at least 1
void SetKernelThreads(int n);  // for kernels started from the calling thread

}  // namespace shoal
