// The build as the emulation sees it: with CUDA.
#pragma once

namespace shoal {

inline constexpr bool kHaveCuda = true;

}  // namespace shoal
