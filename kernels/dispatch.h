// One declaration per kernel: SHOAL_KERNEL declares cpu::F and cuda::F and defines F, which picks
// by the stream's device. On `meta` nothing runs. A build without CUDA never refers to cuda::F, so
// no stubs are needed.
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

#define SHOAL_KERNEL(F, PARAMETERS, ARGUMENTS)                                          \
  namespace cpu {                                                                       \
  void F PARAMETERS;                                                                    \
  }                                                                                     \
  namespace cuda {                                                                      \
  void F PARAMETERS;                                                                    \
  }                                                                                     \
  inline void F PARAMETERS {                                                            \
    if (stream.device.type == DeviceType::kMeta) return;                                \
    const KernelTimer timer(stream.profile, #F);                                        \
    if constexpr (kHaveCuda) {                                                          \
      if (stream.device.type == DeviceType::kCuda) return cuda::F ARGUMENTS;            \
    }                                                                                   \
    SHOAL_CHECK(stream.device.type == DeviceType::kCpu, #F, "built without {} support", \
                ::shoal::Name(stream.device.type));                                     \
    cpu::F ARGUMENTS;                                                                   \
  }
