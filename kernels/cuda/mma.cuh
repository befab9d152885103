// The tensor-core instructions that the kernels use, for sm_80 and later. Everything else about
// them is plain C++; tests/cuda_emulation has its own version of this file.
//
// Fragments of mma.m16n8k16, by lane with g = lane / 4 and t = lane % 4, two bf16 in a register:
//   A (16 x 16): a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8)
//   B (16 x 8): b[0] (2t, g), b[1] (2t + 8, g), each and the row below
//   C (16 x 8): c[0] (g, 2t), c[1] (g, 2t + 1), c[2] (g + 8, 2t), c[3] (g + 8, 2t + 1)
#pragma once

#include <cstdint>

#include "kernels/cuda/device_utils.cuh"

namespace shoal::kernels::cuda {

// Four 8 x 8 matrices of bf16 from shared memory; lane i gives the address of row i % 8 of matrix
// i / 8, 16 bytes long and aligned. Lane l receives, of matrix j, (l / 4, 2 (l % 4)) and the
// element to its right in r[j].
__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], const BF16* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// As above, each matrix transposed: lane l receives (2 (l % 4), l / 4) and the element below.
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], const BF16* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two bf16 in a register, `low` in the lower half, as memory has them.
__device__ __forceinline__ uint32_t PackBF16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Starts copying 16 bytes to shared memory, or zeros where `present` is false (`from` must still be
// an address that may be read).
__device__ __forceinline__ void CopyAsync16(BF16* to, const BF16* from, bool present) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last kPending groups have arrived (this thread's; a barrier tells
// others).
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace shoal::kernels::cuda
