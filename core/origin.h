// Where memory is asked for: the module, the op and the pass that this thread is in. Blocks of the
// allocator carry it, so that a report of memory can name what is alive. Three words, set by
// scopes; no string is made and nothing is allocated on the way.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

enum class Pass : uint8_t { kNone, kForward, kRecompute, kBackward };
const char* Name(Pass pass);  // "" for kNone

struct Origin {
  const std::string* module = nullptr;  // dotted path, or a parameter's name; see Intern
  const char* op = nullptr;             // lives as long as the program
  Pass pass = Pass::kNone;
};

// One copy of `text` for the life of the program. Thread-safe.
const std::string* Intern(std::string_view text);

const Origin& CurrentOrigin();  // of this thread

// Changes a part of it, or all, while in scope.
class OriginScope {
 public:
  explicit OriginScope(const Origin& origin);
  explicit OriginScope(const std::string* module);  // null: changes nothing
  explicit OriginScope(const char* op);
  explicit OriginScope(Pass pass);
  ~OriginScope();
  OriginScope(const OriginScope&) = delete;
  OriginScope& operator=(const OriginScope&) = delete;

 private:
  Origin previous_;
};

// What a block of memory is.
struct BlockLabel {
  Origin origin;
  DType dtype = DType::kU8;
  Dims shape;  // empty: scratch of a kernel
};

}  // namespace shoal
