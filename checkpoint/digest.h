// Digests of bytes in files: XXH3-128, as 32 hexadecimal digits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct XXH3_state_s;

namespace shoal {

// Of bytes that come in parts.
class RunningDigest {
 public:
  RunningDigest();
  void Add(const void* data, int64_t bytes);
  std::string Take();  // and begins again

 private:
  struct Free {
    void operator()(XXH3_state_s* state) const;
  };
  std::unique_ptr<XXH3_state_s, Free> state_;
};

std::string Digest(std::string_view bytes);

}  // namespace shoal
