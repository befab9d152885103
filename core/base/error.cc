#include "core/base/error.h"

#include <cstring>

namespace shoal {
namespace {
thread_local int thread_rank = 0;
}  // namespace

void SetThreadRank(int rank) { thread_rank = rank; }
int ThreadRank() { return thread_rank; }

Error::Error(ErrorKind kind, std::string op, std::string message, const char* file, int line)
    : kind_(kind), op_(std::move(op)), message_(std::move(message)), rank_(ThreadRank()) {
  text_ = fmt::format("[{}] {}", op_, message_);
  // Only a bug is traced to our source; a user's mistake is traced to the user's file.
  if (kind_ == ErrorKind::kBug) text_ += fmt::format(" (rank {}, {}:{})", rank_, file, line);
}

}  // namespace shoal
