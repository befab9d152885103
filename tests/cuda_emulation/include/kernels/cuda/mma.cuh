// kernels/cuda/mma.cuh on the CPU: the same functions by the layouts that its comments state.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/device_utils.cuh"

namespace shoal::kernels::cuda {

struct MatrixLane {
  const BF16* row;
  BF16 (*result)[2];  // of four matrices
};

template <bool kTransposed>
void LoadEmulated(uint32_t (&r)[4], const BF16* row) {
  SHOAL_CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0, "emulation", "a misaligned matrix row");
  BF16 result[4][2];
  MatrixLane mine = {row, result};
  cuda_emulation::WarpTogether(&mine, [](cuda_emulation::Lanes& all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        for (int half = 0; half < 2; ++half) {
          const int pair = 2 * (lane % 4) + half;
          const int i = kTransposed ? pair : lane / 4, column = kTransposed ? lane / 4 : pair;
          static_cast<MatrixLane*>(all[lane])->result[j][half] =
              static_cast<MatrixLane*>(all[8 * j + i])->row[column];
        }
      }
    }
  });
  std::memcpy(&r, result, sizeof r);
}
inline void LoadMatrices(uint32_t (&r)[4], const BF16* row) { LoadEmulated<false>(r, row); }
inline void LoadMatricesTransposed(uint32_t (&r)[4], const BF16* row) {
  LoadEmulated<true>(r, row);
}

struct MmaLane {
  float* c;
  BF16 a[4][2], b[2][2];
};

inline void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane mine = {c, {}, {}};
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b[0], &b0, sizeof b0);
  std::memcpy(mine.b[1], &b1, sizeof b1);
  cuda_emulation::WarpTogether(&mine, [](cuda_emulation::Lanes& all) {
    float x[16][16], y[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaLane& from = *static_cast<MmaLane*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          x[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = static_cast<float>(from.a[i][half]);
        for (int i = 0; i < 2; ++i)
          y[2 * t + 8 * i + half][g] = static_cast<float>(from.b[i][half]);
      }
    }
    float sums[16][8] = {};
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) sums[i][j] += x[i][k] * y[k][j];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<MmaLane*>(all[lane])->c[i] +=
            sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  });
}

inline uint32_t PackBF16(float low, float high) {
  const BF16 pair[2] = {BF16(low), BF16(high)};
  uint32_t packed;
  std::memcpy(&packed, pair, sizeof packed);
  return packed;
}

inline void CopyAsync16(BF16* to, const BF16* from, bool present) {
  cuda_emulation::StartCopy(to, present ? from : nullptr);
}
inline void CommitCopies() { cuda_emulation::CloseCopyGroup(); }
template <int kPending>
void WaitForCopies() {
  cuda_emulation::WaitForCopyGroups(kPending);
}

}  // namespace shoal::kernels::cuda
