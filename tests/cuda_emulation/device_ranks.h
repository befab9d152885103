// Ranks as threads, each of which computes on the emulated device and talks to the others over
// NCCL.
#pragma once

#include <functional>

#include "core/context.h"
#include "parallel/communicator.h"

namespace shoal::testing {

inline void RunDeviceRanks(int ranks, const std::function<void(Communicator&)>& f) {
  RunThreadRanks(ranks, 1, [&](Communicator& host) {
    ExecutionContext context({DeviceType::kCuda, 0});
    const ContextScope scope(context);
    const std::unique_ptr<Communicator> ranks_on_device = MakeNcclCommunicator(host.Duplicate());
    f(*ranks_on_device);
  });
}

}  // namespace shoal::testing
