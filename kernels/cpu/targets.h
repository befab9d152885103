// Which instruction sets the CPU kernels are compiled for: on x86-64, AVX2 and AVX-512, chosen when
// the program runs. Include before any header of Highway.
#pragma once

#ifdef __x86_64__
// Without this the fallback would be scalar code: a program that needs AVX2 is of more use than one
// that runs anywhere a hundred times slower.
#define HWY_BASELINE_TARGETS HWY_AVX2
#define HWY_DISABLED_TARGETS HWY_AVX3_DL
#endif
