// Where a rank's time goes: seconds inside kernels and collectives, by name. On the CPU that is the
// time of the call; on CUDA the time to queue it.
#pragma once

#include <chrono>
#include <utility>
#include <vector>

namespace shoal {

class KernelProfile {
 public:
  // `name` must outlive the profile (a literal).
  void Add(const char* name, double seconds) {
    total_ += seconds;
    for (auto& [n, s] : parts_) {
      if (n == name) {
        s += seconds;
        return;
      }
    }
    parts_.emplace_back(name, seconds);
  }
  double total() const { return total_; }
  const std::vector<std::pair<const char*, double>>& parts() const { return parts_; }

 private:
  double total_ = 0;
  std::vector<std::pair<const char*, double>> parts_;
};

// Adds the time of its scope to `profile`, if there is one.
class KernelTimer {
 public:
  KernelTimer(KernelProfile* profile, const char* name) : profile_(profile), name_(name) {
    if (profile_ != nullptr) begin_ = std::chrono::steady_clock::now();
  }
  ~KernelTimer() {
    if (profile_ == nullptr) return;
    profile_->Add(name_,
                  std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count());
  }
  KernelTimer(const KernelTimer&) = delete;
  KernelTimer& operator=(const KernelTimer&) = delete;

 private:
  KernelProfile* profile_;
  const char* name_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace shoal
