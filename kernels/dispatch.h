// One declaration per kernel: SHOAL_KERNEL declares cpu::F and cuda::F and defines F, which picks
// by the stream's device. A build without CUDA never refers to cuda::F, so no stubs are needed.
//
// On `meta` nothing is computed. A kernel whose cpu::F needs scratch is declared by
// SHOAL_KERNEL_WITH_SCRATCH: there cpu::F obtains it, for it to be counted, and returns
// (Stream::counting); it may look at no data.
//
// Conventions of every kernel header:
//   - the stream comes first, then outputs, then inputs, then options;
//   - views are contiguous (row-major) unless the contract says "strided";
//   - outputs do not overlap inputs unless the contract says "may alias";
//   - floating-point arguments are f64, f32 or bf16; sums are held in Accumulator<T> (f32, or f64);
//   - results do not depend on the number of threads;
//   - a shape or dtype outside the contract throws Error(kBug) naming the kernel and both values.
#pragma once

#include "core/base/build_config.h"
#include "core/base/stream.h"
#include "core/base/view.h"

#define SHOAL_KERNEL(F, PARAMETERS, ARGUMENTS) \
  SHOAL_KERNEL_ON_META(F, PARAMETERS, ARGUMENTS, (void)0)
#define SHOAL_KERNEL_WITH_SCRATCH(F, PARAMETERS, ARGUMENTS) \
  SHOAL_KERNEL_ON_META(F, PARAMETERS, ARGUMENTS, cpu::F ARGUMENTS)

#define SHOAL_KERNEL_ON_META(F, PARAMETERS, ARGUMENTS, COUNT)                           \
  namespace cpu {                                                                       \
  void F PARAMETERS;                                                                    \
  }                                                                                     \
  namespace cuda {                                                                      \
  void F PARAMETERS;                                                                    \
  }                                                                                     \
  inline void F PARAMETERS {                                                            \
    if (stream.counting()) return COUNT;                                                \
    const KernelTimer timer(stream.profile, #F);                                        \
    if constexpr (kHaveCuda) {                                                          \
      if (stream.device.type == DeviceType::kCuda) return cuda::F ARGUMENTS;            \
    }                                                                                   \
    SHOAL_CHECK(stream.device.type == DeviceType::kCpu, #F, "built without {} support", \
                ::shoal::Name(stream.device.type));                                     \
    cpu::F ARGUMENTS;                                                                   \
  }
