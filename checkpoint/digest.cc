#include "checkpoint/digest.h"

#include <fmt/format.h>
#include <xxhash.h>

namespace shoal {

void RunningDigest::Free::operator()(XXH3_state_s* state) const { XXH3_freeState(state); }

RunningDigest::RunningDigest() : state_(XXH3_createState()) { XXH3_128bits_reset(state_.get()); }

void RunningDigest::Add(const void* data, int64_t bytes) {
  XXH3_128bits_update(state_.get(), data, static_cast<size_t>(bytes));
}

std::string RunningDigest::Take() {
  const XXH128_hash_t h = XXH3_128bits_digest(state_.get());
  XXH3_128bits_reset(state_.get());
  return fmt::format("{:016x}{:016x}", h.high64, h.low64);
}

std::string Digest(std::string_view bytes) {
  RunningDigest digest;
  digest.Add(bytes.data(), std::ssize(bytes));
  return digest.Take();
}

}  // namespace shoal
