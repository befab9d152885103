#include "launch/bootstrap.h"

#include <cstdlib>
#include <string>

#include "core/context.h"

namespace shoal {
namespace {

int Number(const char* variable, int missing) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != '\0' ? std::atoi(text) : missing;
}

}  // namespace

Launcher DetectLauncher() {
  // OpenMPI, then PMI-style launchers (srun --mpi=pmix or pmi2 sets SLURM's own).
  if (const int size = Number("OMPI_COMM_WORLD_SIZE", 0)) {
    return {true, Number("OMPI_COMM_WORLD_RANK", 0), size};
  }
  if (std::getenv("PMIX_RANK") != nullptr || std::getenv("PMI_RANK") != nullptr) {
    return {true, Number("SLURM_PROCID", Number("PMIX_RANK", 0)), Number("SLURM_NTASKS", Number("PMI_SIZE", 1))};
  }
  return {};
}

void Agree(Communicator& communicator, const std::function<void()>& f) {
  // "kind rank op \n message", or nothing.
  std::string mine;
  try {
    f();
  } catch (const Error& e) {
    mine = fmt::format("{}\n{}\n{}", static_cast<int>(e.kind()), e.op(), e.message());
    if (communicator.size() == 1) throw;
  }
  const std::vector<std::string> all = communicator.AllGatherStrings(mine);
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    const size_t first = all[r].find('\n'), second = all[r].find('\n', first + 1);
    const auto kind = static_cast<ErrorKind>(std::stoi(all[r].substr(0, first)));
    std::string message = all[r].substr(second + 1);
    if (r > 0) message += fmt::format(" (found by rank {})", r);
    throw Error(kind, all[r].substr(first + 1, second - first - 1), message, __FILE__, __LINE__);
  }
}

}  // namespace shoal
