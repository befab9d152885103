#include "core/origin.h"

#include <mutex>
#include <set>

namespace shoal {
namespace {
thread_local Origin current;
}  // namespace

const char* Name(Pass pass) {
  constexpr const char* kNames[] = {"", "forward", "recomputed", "backward"};
  return kNames[static_cast<int>(pass)];
}

const std::string* Intern(std::string_view text) {
  static std::mutex mutex;
  // Never destroyed: blocks of static lifetime may outlive main.
  static auto* all = new std::set<std::string, std::less<>>;
  const std::lock_guard lock(mutex);
  const auto found = all->find(text);
  return &*(found != all->end() ? found : all->emplace(text).first);
}

const Origin& CurrentOrigin() { return current; }

OriginScope::OriginScope(const Origin& origin) : previous_(current) { current = origin; }
OriginScope::OriginScope(const std::string* module) : previous_(current) {
  if (module != nullptr) current.module = module;
}
OriginScope::OriginScope(const char* op) : previous_(current) { current.op = op; }
OriginScope::OriginScope(Pass pass) : previous_(current) { current.pass = pass; }
OriginScope::~OriginScope() { current = previous_; }

}  // namespace shoal
