#include "launch/bootstrap.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

#include "core/base/build_config.h"
#include "core/base/thread_count.h"
#include "core/context.h"
#include "kernels/cuda_runtime.h"
#include "launch/failure.h"
#include "launch/memory_report.h"

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
    return {true, Number("SLURM_PROCID", Number("PMIX_RANK", 0)),
            Number("SLURM_NTASKS", Number("PMI_SIZE", 1))};
  }
  return {};
}

namespace {

// An error that all ranks know of: they end in order, and one of them prints it. It names the rank
// and the host where it happened.
class CommonError : public Error {
 public:
  CommonError(const Error& error, std::string host) : Error(error), host_(std::move(host)) {}
  const std::string& host() const { return host_; }

 private:
  std::string host_;
};

// f's result; what the standard library throws becomes an Error, so that it too ends the other
// ranks.
template <class F>
auto CallWithErrors(const F& f) {
  try {
    return f();
  } catch (const OutOfMemory& e) {
    SHOAL_FAIL(ErrorKind::kMemory, e.op(), "{}\n{}", e.message(), MemoryText(Summarise(e.live())));
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    SHOAL_FAIL(
        ErrorKind::kMemory, "memory",
        "the system gives this process no more memory (ulimit -v says how much it may have)");
  } catch (const std::exception& e) {
    SHOAL_FAIL(ErrorKind::kBug, "shoal", "{}", e.what());
  }
}

Device DeviceFor(const std::string& name, int local_rank) {
  if (name == "cpu") return {};
  if (name != "cuda")
    SHOAL_FAIL(ErrorKind::kConfig, "command line", "--device {} is not cpu or cuda", name);
  if constexpr (kHaveCuda) {
    const int devices = cuda::DeviceCount();
    if (local_rank < devices) return {DeviceType::kCuda, local_rank};
    SHOAL_FAIL(ErrorKind::kConfig, "command line",
               "--device cuda: rank {} of this host finds {} device{}", local_rank, devices,
               devices == 1 ? "" : "s");
  }
  SHOAL_FAIL(ErrorKind::kConfig, "command line", "--device cuda: this build has no CUDA");
}

// A launcher may leave every rank free to use all cores: then they share them.
void ShareCores() {
  if (std::getenv("OMP_NUM_THREADS") != nullptr) return;
  const int local_size = Number("OMPI_COMM_WORLD_LOCAL_SIZE", Number("SLURM_NTASKS_PER_NODE", 1));
  const int mine = KernelThreads(), all = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  if (mine == all && local_size > 1) SetKernelThreads(std::max(1, all / local_size));
}

// What the user would type before the program's name, to start it again as it was started.
std::string LauncherCommand(int ranks) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr && std::getenv("SLURM_PROCID") != nullptr)
    return fmt::format("srun -n {} ", ranks);
  const bool root = geteuid() == 0 && std::getenv("OMPI_ALLOW_RUN_AS_ROOT") == nullptr;
  return fmt::format("mpirun {}-n {} ", root ? "--allow-run-as-root " : "", ranks);
}

int Guarded(Communicator& communicator, const std::function<int()>& f) {
  try {
    return CallWithErrors(f);
  } catch (const CommonError& e) {
    if (communicator.rank() == 0) PrintError(e, e.host());
    return static_cast<int>(e.kind());
  } catch (const Error& e) {
    PrintError(e);
    communicator.Abort(static_cast<int>(e.kind()));
    return static_cast<int>(e.kind());
  }
}

}  // namespace

int RunRanks(const RunOptions& options, const std::function<int(Communicator&)>& f) {
  const Launcher launcher = DetectLauncher();
  try {
    if (options.local_ranks < 1) {
      SHOAL_FAIL(ErrorKind::kConfig, "command line", "--local-ranks {} is not positive",
                 options.local_ranks);
    }
    if (options.local_ranks > 1) {
      if (launcher.size > 1) {
        SHOAL_FAIL(
            ErrorKind::kConfig, "command line",
            "--local-ranks {} under a launcher that started {} processes: use one of the two",
            options.local_ranks, launcher.size);
      }
      if (options.device != "cpu") {
        SHOAL_FAIL(ErrorKind::kConfig, "command line",
                   "--local-ranks are threads on the CPU, not on {}", options.device);
      }
      SetFailureContext([&](FailureContext& context) {
        context.ranks = options.local_ranks;
        context.threads = true;
      });
      int code = 0;
      RunThreadRanks(options.local_ranks, 0, [&](Communicator& communicator) {
        const int mine = CallWithErrors([&] { return f(communicator); });
        if (communicator.rank() == 0) code = mine;
      });
      return code;
    }
    const std::unique_ptr<Communicator> communicator =
        launcher.size > 1 ? MakeMpiCommunicator() : MakeSelfCommunicator();
    SetThreadRank(communicator->rank());
    SetFailureContext([&](FailureContext& context) {
      context.ranks = communicator->size();
      if (launcher.size > 1) context.launcher = LauncherCommand(launcher.size);
    });
    if (launcher.size > 1) ShareCores();
    communicator->WatchPeers([&](int rank, const std::string& what) {
      const int64_t step = CurrentFailureContext().step;
      SetThreadRank(rank);
      PrintError(Error(ErrorKind::kHang, "watchdog",
                       step > 0 ? fmt::format("at step {}: {}", step, what) : what, __FILE__,
                       __LINE__));
      communicator->Abort(static_cast<int>(ErrorKind::kHang));
      std::_Exit(static_cast<int>(ErrorKind::kHang));
    });
    return Guarded(*communicator, [&] {
      Device device;
      Agree(*communicator, [&] {
        device = DeviceFor(options.device,
                           Number("OMPI_COMM_WORLD_LOCAL_RANK", Number("SLURM_LOCALID", 0)));
      });
      ExecutionContext context(device);
      const ContextScope scope(context);
      if (device.type == DeviceType::kCuda && communicator->size() > 1) {
        const std::unique_ptr<Communicator> gpus = MakeNcclCommunicator(communicator->Duplicate());
        return f(*gpus);
      }
      communicator->ShareMemory();
      return f(*communicator);
    });
  } catch (const Error& e) {
    if (launcher.rank == 0) PrintError(e);
    return static_cast<int>(e.kind());
  }
}

int FailOnAllRanks(const Error& error) {
  return RunRanks({}, [&](Communicator& communicator) -> int {
    Agree(communicator, [&] { throw error; });
    return 0;
  });
}

void Agree(Communicator& communicator, const std::function<void()>& f) {
  // "kind \n host \n op \n message", or nothing.
  std::string mine;
  try {
    CallWithErrors(f);
  } catch (const Error& e) {
    mine = fmt::format("{}\n{}\n{}\n{}", static_cast<int>(e.kind()), communicator.host(), e.op(),
                       e.message());
  }
  const std::vector<std::string> all = communicator.AllGatherStrings(mine);
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    std::string_view rest = all[r];
    const auto next = [&rest] {
      const size_t end = rest.find('\n');
      std::string field(rest.substr(0, end));
      rest.remove_prefix(end + 1);
      return field;
    };
    const auto kind = static_cast<ErrorKind>(std::stoi(next()));
    const std::string host = next(), op = next();
    const int mine_rank = ThreadRank();
    SetThreadRank(static_cast<int>(r));  // whose error it is
    const Error error(kind, op, std::string(rest), __FILE__, __LINE__);
    SetThreadRank(mine_rank);
    throw CommonError(error, host);
  }
}

}  // namespace shoal
