// Where a tensor lives. `meta` has shapes and counted bytes but no memory: kernels do nothing
// there, so the planner runs the real code and reads the real peak.
#pragma once

#include <cstdint>

namespace shoal {

enum class DeviceType : uint8_t { kCpu, kCuda, kMeta };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

constexpr const char* Name(DeviceType type) {
  constexpr const char* kNames[] = {"cpu", "cuda", "meta"};
  return kNames[static_cast<int>(type)];
}

}  // namespace shoal
