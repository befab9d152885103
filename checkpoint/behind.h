// Work of a rank that goes on behind what its thread does.
#pragma once

#include <future>
#include <utility>

#include "core/base/error.h"

namespace shoal {

// f() in a thread of its own, whose errors name this thread's rank. The future waits for it.
template <class F>
auto Behind(F f) {
  return std::async(std::launch::async, [rank = ThreadRank(), f = std::move(f)]() mutable {
    SetThreadRank(rank);
    return f();
  });
}

}  // namespace shoal
