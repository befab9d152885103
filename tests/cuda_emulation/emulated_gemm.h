// What the emulated cuBLASLt has kernels for.
#pragma once

namespace cuda_emulation {

enum class Library { kWhole, kWithoutEpilogue, kAbsent };
extern Library library;

}  // namespace cuda_emulation
