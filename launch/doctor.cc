#include "launch/doctor.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "checkpoint/file_io.h"
#include "checkpoint/hdf5_file.h"
#include "core/base/build_config.h"
#include "core/base/error.h"
#include "launch/bootstrap.h"
#include "launch/console.h"
#include "parallel/communicator.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

double FreeBytes(const std::string& path) {
  struct statvfs status;
  if (statvfs(path.c_str(), &status) != 0) return 0;
  return static_cast<double>(status.f_bavail) * static_cast<double>(status.f_frsize);
}

// The first line of `path` that begins with `key`, without it; empty if there is none.
std::string LineOf(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const size_t value = line.find_first_not_of(" \t:", key.size());
    return value == std::string::npos ? "" : line.substr(value);
  }
  return "";
}

Check CheckCores() {
  Check check{.name = "cores"};
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  const int online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  const int usable =
      sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : online;
  check.found = fmt::format("{} usable of {}", usable, online);
  // A quota of a container: "max 100000" or "150000 100000" microseconds.
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (quota_file >> quota >> period && period > 0) {
    check.found += fmt::format(", {:.3g} granted by the container", quota / period);
    if (quota / period < usable) {
      check.status = Check::kWarn;
      check.advice = fmt::format("more threads than that only wait: set OMP_NUM_THREADS={:.0f}",
                                 std::max(1.0, quota / period));
    }
  }
  return check;
}

Check CheckCpu() {
  Check check{.name = "CPU"};
  check.found = LineOf("/proc/cpuinfo", "model name");
  if (check.found.empty()) check.found = "unknown model";
#if defined(__x86_64__)
  const struct {
    const char* name;
    bool present;
  } features[] = {{"AVX2", __builtin_cpu_supports("avx2") != 0},
                  {"FMA", __builtin_cpu_supports("fma") != 0},
                  {"AVX-512", __builtin_cpu_supports("avx512f") != 0},
                  {"AVX-512 BF16", __builtin_cpu_supports("avx512bf16") != 0}};
  for (const auto& [name, present] : features)
    if (present) check.found += fmt::format(", {}", name);
  std::istringstream flags(LineOf("/proc/cpuinfo", "flags"));
  for (std::string flag; flags >> flag;)
    if (flag == "amx_bf16") check.found += ", AMX BF16";
  if (!features[0].present) {
    check.status = Check::kWarn;
    check.advice = "without AVX2 the kernels run several times slower";
  }
#endif
  return check;
}

Check CheckMemory() {
  Check check{.name = "memory"};
  const double page = static_cast<double>(sysconf(_SC_PAGESIZE));
  const double all = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * page;
  double available = static_cast<double>(sysconf(_SC_AVPHYS_PAGES)) * page;
  if (const std::string line = LineOf("/proc/meminfo", "MemAvailable"); !line.empty())
    available = std::atof(line.c_str()) * 1024;
  check.found = fmt::format("{}, {} available", ShortBytes(all), ShortBytes(available));
  std::ifstream limit_file("/sys/fs/cgroup/memory.max");
  double limit = 0;
  if (limit_file >> limit && limit < all) {
    check.found += fmt::format(", {} granted by the container", ShortBytes(limit));
    available = std::min(available, limit);
  }
  if (available < 512.0 * (1 << 20)) {
    check.status = Check::kWarn;
    check.advice = "only the smallest models fit; shoal plan says what a run takes";
  }
  return check;
}

Check CheckHugePages() {
  Check check{.name = "huge pages"};
  std::ifstream in("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string modes;
  std::getline(in, modes);
  const size_t open = modes.find('[');
  check.found =
      open == std::string::npos ? "unknown" : modes.substr(open + 1, modes.find(']') - open - 1);
  if (check.found == "never") {
    check.status = Check::kWarn;
    check.advice =
        "large tensors run slower: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
  }
  return check;
}

Check CheckSharedMemory() {
  Check check{.name = "shared memory"};
  const double free = FreeBytes("/dev/shm");
  check.found = fmt::format("{} free in /dev/shm", ShortBytes(free));
  const std::string name = fmt::format("/dev/shm/shoal-doctor-{}", getpid());
  const int file = open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) {
    check.status = Check::kFail;
    check.found = fmt::format("cannot write in /dev/shm: {}", std::strerror(errno));
    check.advice = "several ranks on one host exchange data there: mount a tmpfs on /dev/shm";
    return check;
  }
  close(file);
  unlink(name.c_str());
  if (free < 256.0 * (1 << 20)) {
    check.status = Check::kWarn;
    check.advice =
        "several ranks on one host need more: docker run --shm-size=1g, or mount -o "
        "remount,size=1g /dev/shm";
  }
  return check;
}

// What a save does: write, sync, rename, sync the directory, read back.
Check CheckDirectory(const std::string& directory) {
  Check check{.name = "storage"};
  const fs::path temporary =
      fs::path(directory) / fmt::format(".shoal-doctor-{}.partial", getpid());
  const fs::path final_name = fs::path(directory) / fmt::format(".shoal-doctor-{}", getpid());
  const std::string content(1 << 16, 's');
  std::string failed;
  const auto step = [&](const char* what, bool good) {
    if (failed.empty() && !good) failed = fmt::format("{} fails: {}", what, std::strerror(errno));
    return good;
  };
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (step("creating a file", file >= 0)) {
    step("writing",
         write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
    step("fsync", fsync(file) == 0);
    step("closing", close(file) == 0);
    step("renaming", rename(temporary.c_str(), final_name.c_str()) == 0);
    const int folder = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    step("fsync of the directory", folder >= 0 && fsync(folder) == 0);
    if (folder >= 0) close(folder);
    std::ifstream in(final_name, std::ios::binary);
    std::ostringstream back;
    back << in.rdbuf();
    errno = EIO;
    step("reading back", back.str() == content);
    unlink(temporary.c_str());
    unlink(final_name.c_str());
  }
  const double free = FreeBytes(directory);
  std::error_code ignored;
  const std::string name = fs::weakly_canonical(directory, ignored).string();
  if (!failed.empty()) {
    check.status = Check::kFail;
    check.found = fmt::format("{}: {}", name, failed);
    check.advice = "run directories and saves cannot be kept here: choose run.dir elsewhere";
    return check;
  }
  check.found = fmt::format("{}: write, fsync and rename work, {} free", name, ShortBytes(free));
  if (free < 1.0 * (1 << 30)) {
    check.status = Check::kWarn;
    check.advice = "a save of a large model does not fit; shoal plan says how large it is";
  }
  return check;
}

Check CheckGpu() {
  Check check{.name = "GPU"};
  int devices = 0;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator("/dev", error)) {
    const std::string name = entry.path().filename().string();
    devices +=
        name.starts_with("nvidia") && name.size() > 6 &&
        std::all_of(name.begin() + 6, name.end(), [](unsigned char c) { return std::isdigit(c); });
  }
  const std::string driver = LineOf("/proc/driver/nvidia/version", "NVRM version");
  check.found = devices == 0 ? "none" : fmt::format("{} NVIDIA, {}", devices, driver);
  check.found += kHaveCuda ? "; this program has GPU kernels" : "; this program has no GPU kernels";
  if (devices > 0 && !kHaveCuda) {
    check.status = Check::kWarn;
    check.advice = "install the CUDA toolkit and build again with -DSHOAL_CUDA=ON to use the GPU";
  }
  return check;
}

// Runs f in a child whose output goes nowhere: a library that cannot start may end its process.
// Returns what f wrote, or nothing if the child did not end well in `seconds`.
std::optional<std::string> InChild(int seconds, const std::function<std::string()>& f) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return std::nullopt;
  const pid_t child = fork();
  if (child == 0) {
    const int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (const int file : {STDOUT_FILENO, STDERR_FILENO}) dup2(nowhere, file);
    int code = 1;
    try {
      const std::string text = f();
      code = write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()) ? 0 : 1;
    } catch (const std::exception&) {
    }
    std::exit(code);  // not _exit: MPI ends in a handler of exit
  }
  close(ends[1]);
  int status = 0;
  bool ended = child < 0;
  for (int i = 0; i < seconds * 50 && !ended; ++i) {
    ended = waitpid(child, &status, WNOHANG) != 0;
    if (!ended) usleep(20000);
  }
  if (!ended) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
  }
  char text[1024];
  const ssize_t size = read(ends[0], text, sizeof(text));
  close(ends[0]);
  if (child < 0 || !ended || !WIFEXITED(status) || WEXITSTATUS(status) != 0) return std::nullopt;
  return std::string(text, static_cast<size_t>(std::max<ssize_t>(0, size)));
}

Check CheckMpi() {
  Check check{.name = "MPI"};
  if (!kHaveMpi) {
    check.found = "this program is built without it";
    check.status = Check::kWarn;
    check.advice = "ranks are threads only (--local-ranks): install MPI and build again for mpirun";
    return check;
  }
  check.found = MpiDescription();
  check.found = check.found.substr(0, check.found.find(','));
  if (DetectLauncher().present) return check;  // one process of a job starts it once
  const auto size = InChild(20, [] {
    const auto communicator = MakeMpiCommunicator();
    communicator->Barrier();
    return fmt::format("{}", communicator->size());
  });
  if (size) {
    check.found += ", starts";
    if (geteuid() == 0 && std::getenv("OMPI_ALLOW_RUN_AS_ROOT") == nullptr)
      check.found += "; for root, mpirun wants --allow-run-as-root";
  } else {
    check.status = Check::kFail;
    check.advice = "it does not start in this process; mpirun -n 1 shoal doctor shows what it says";
  }
  return check;
}

Check CheckHdf5(const std::string& directory) {
  Check check{.name = "HDF5"};
  if (!kHaveHdf5) {
    check.found = "this program is built without it";
    check.status = Check::kFail;
    check.advice = "nothing can be saved: install HDF5 and build again";
    return check;
  }
  const std::string path = fmt::format("{}/.shoal-doctor-{}.h5", directory, getpid());
  try {
    const std::array<float, 3> written = {1.5f, -0.0f, 3e38f};
    std::array<float, 3> back{};
    const Hdf5Array array = {"a/b", DType::kF32, {3}};
    const Hdf5Layout layout = LayOutHdf5({array});
    File file = File::Create(path);
    const char* frame = layout.frame.data();
    for (const Extent& gap : Gaps({{layout.offsets[0], array.bytes()}}, layout.size)) {
      file.Write(frame, gap.bytes, gap.at, {});
      frame += gap.bytes;
    }
    file.Write(written.data(), array.bytes(), layout.offsets[0], {});
    ReadHdf5(path, array, back.data());
    SHOAL_CHECK(written == back, "HDF5", "an array reads back as another");
    check.found = "an array is written and reads back";
  } catch (const Error& e) {
    check.status = Check::kFail;
    check.found = e.message();
    check.advice = "saves will fail the same way";
  }
  unlink(path.c_str());
  return check;
}

}  // namespace

std::vector<Check> CheckMachine(const std::string& directory) {
  return {CheckCpu(),
          CheckCores(),
          CheckMemory(),
          CheckHugePages(),
          CheckSharedMemory(),
          CheckGpu(),
          CheckDirectory(directory)};
}

std::vector<Check> CheckLibraries(const std::string& directory) {
  return {CheckMpi(), CheckHdf5(directory)};
}

std::string CheckText(const std::vector<Check>& checks, bool color) {
  static constexpr const char* kWords[] = {"ok  ", "warn", "FAIL"};
  static constexpr const char* kColors[] = {"\x1b[32m", "\x1b[33m", "\x1b[1;31m"};
  size_t width = 0;
  for (const Check& check : checks) width = std::max(width, check.name.size());
  std::string text;
  for (const Check& check : checks) {
    text +=
        fmt::format("{}{}{}  {:<{}}  {}\n", color ? kColors[check.status] : "",
                    kWords[check.status], color ? "\x1b[0m" : "", check.name, width, check.found);
    if (!check.advice.empty()) text += fmt::format("      {:<{}}  {}\n", "", width, check.advice);
  }
  return text;
}

std::string CheckJson(const std::vector<Check>& checks) {
  static constexpr const char* kWords[] = {"ok", "warn", "fail"};
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  bool ok = true;
  for (const Check& check : checks) {
    ok = ok && check.status != Check::kFail;
    list.push_back({{"name", check.name},
                    {"status", kWords[check.status]},
                    {"found", check.found},
                    {"advice", check.advice}});
  }
  const nlohmann::ordered_json object = {{"ok", ok}, {"checks", list}};
  return object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

int DoctorCommand(bool json) {
  std::vector<Check> checks = CheckMachine(".");
  for (Check& check : CheckLibraries(".")) checks.push_back(std::move(check));
  if (json)
    fmt::print("{}\n", CheckJson(checks));
  else
    fmt::print("{}", CheckText(checks, TerminalOf(STDOUT_FILENO).color));
  const bool failed =
      std::ranges::any_of(checks, [](const Check& check) { return check.status == Check::kFail; });
  return failed ? static_cast<int>(ErrorKind::kConfig) : 0;
}

}  // namespace shoal
