#include "launch/run_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

#include "checkpoint/store.h"
#include "core/base/atomic_file.h"
#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

constexpr std::string_view kPartial = ".partial-";

std::string Reason() { return std::strerror(errno); }

[[noreturn]] void Fail(const std::string& what) {
  throw Error(ErrorKind::kStorage, "run directory", what, __FILE__, __LINE__);
}

void WriteFile(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.Write(text.data(), text.size());
  file.Commit();
}

// The descriptor that holds the lock, or -1 if another process has it.
int TryLock(const std::string& run) {
  const std::string path = run + "/lock";
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (file < 0) Fail(fmt::format("cannot write {}: {}", path, Reason()));
  if (flock(file, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(file);
    if (error == EWOULDBLOCK) return -1;
    Fail(fmt::format("cannot lock {}: {}", path, std::strerror(error)));
  }
  // Who it is, for the message to a second one. The lock holds without it.
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  const std::string owner = fmt::format("process {} on {}\n", getpid(), host);
  if (ftruncate(file, 0) == 0) [[maybe_unused]]
    const ssize_t written = write(file, owner.data(), owner.size());
  return file;
}

std::string LockOwner(const std::string& run) {
  char text[512];
  const int file = open((run + "/lock").c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return "another process";
  const ssize_t size = read(file, text, sizeof(text));
  close(file);
  return size > 1 ? std::string(text, static_cast<size_t>(size) - 1) : "another process";
}

// Without a trailing slash, which would make the temporary name one inside the directory.
fs::path Normal(const std::string& path) {
  fs::path normal = fs::absolute(path).lexically_normal();
  return normal.has_filename() ? normal : normal.parent_path();
}

// Left by processes that were killed while they created a run of this name.
void RemoveStale(const fs::path& run) {
  const std::string prefix = run.filename().string() + std::string(kPartial);
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(run.parent_path(), error)) {
    if (!entry.path().filename().string().starts_with(prefix)) continue;
    const auto age = fs::file_time_type::clock::now() - entry.last_write_time(error);
    if (error || age < std::chrono::minutes(1)) continue;  // may not have its lock yet
    try {
      const int lock = TryLock(entry.path());
      if (lock < 0) continue;
      fs::remove_all(entry.path(), error);
      close(lock);
    } catch (const Error&) {
    }
  }
}

// Removes on destruction what a failed creation has made.
struct Undo {
  fs::path partial;        // the directory under its temporary name
  fs::path first_created;  // topmost parent that did not exist
  fs::path parent;
  ~Undo() {
    std::error_code ignored;
    if (!partial.empty()) fs::remove_all(partial, ignored);
    if (first_created.empty()) return;
    // Only what is empty: another run may have moved in.
    for (fs::path p = parent;; p = p.parent_path()) {
      if (!fs::remove(p, ignored) || p == first_created) return;
    }
  }
  void Keep() {
    partial.clear();
    first_created.clear();
  }
};

}  // namespace

RunDirectory RunDirectory::Create(const std::string& path, std::string_view config_toml,
                                  std::string_view plan_json, int64_t save_bytes,
                                  int64_t largest_file) {
  std::error_code error;
  fs::path run = Normal(path);
  const auto taken = [&] {
    if (fs::exists(run / "config.toml", error))
      Fail(fmt::format(
          "{} already holds a run. To go on with it: shoal resume {}. To start another, "
          "choose another run.dir",
          path, path));
    if (fs::exists(run, error) && !fs::is_directory(run, error))
      Fail(fmt::format("{} is a file, not a directory. Choose another run.dir", path));
    if (fs::exists(run, error) && !fs::is_empty(run, error))
      Fail(
          fmt::format("{} is not empty and holds no run. Choose another run.dir, or a directory "
                      "below it",
                      path));
  };
  taken();
  if (fs::exists(run, error)) run = fs::canonical(run, error);

  Undo undo;
  undo.parent = run.parent_path();
  for (fs::path p = undo.parent; !p.empty() && !fs::exists(p, error); p = p.parent_path())
    undo.first_created = p;
  fs::create_directories(undo.parent, error);
  if (error)
    Fail(fmt::format("cannot create {} for run.dir {}: {}", undo.parent.string(), path,
                     error.message()));
  RemoveStale(run);
  try {
    CheckFreeSpace(undo.parent.string(), save_bytes, largest_file);
  } catch (const Error& e) {
    Fail(fmt::format("no place for run.dir {}: {}", path, e.message()));
  }

  std::string partial = run.string() + std::string(kPartial) + "XXXXXX";
  if (!mkdtemp(partial.data())) Fail(fmt::format("cannot create {}: {}", path, Reason()));
  undo.partial = partial;
  const mode_t mask = umask(0);
  umask(mask);
  chmod(partial.c_str(), 0777 & ~mask);  // mkdtemp shuts out the group

  RunDirectory made(run.string(), TryLock(partial));
  try {
    for (const char* folder : {"/log", "/checkpoints"})
      if (!fs::create_directory(partial + folder, error))
        Fail(fmt::format("cannot create {}: {}", path, error.message()));
    WriteFile(partial + "/plan.json", plan_json);
    WriteFile(partial + "/config.toml", config_toml);
    // Reserves nothing, but finds out now whether the first line of metrics can be written.
    WriteFile(partial + "/metrics.jsonl", "");
  } catch (const Error& e) {
    Fail(fmt::format("cannot create run.dir {}: {}", path, e.message()));
  }
  SyncDirectory(partial);
  if (rename(partial.c_str(), run.c_str()) != 0) {
    const int reason = errno;
    taken();  // by a process that was faster
    Fail(fmt::format("cannot create {}: {}{}", path, std::strerror(reason),
                     reason == EBUSY ? ". It is a mount point: choose a directory below it" : ""));
  }
  undo.Keep();
  SyncDirectory(run.parent_path());
  made.path_ = path;
  return made;
}

RunDirectory RunDirectory::Attach(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) Fail(fmt::format("{} does not exist", path));
  if (!fs::is_directory(path, error)) Fail(fmt::format("{} is not a directory", path));
  if (!fs::exists(path + "/config.toml", error))
    Fail(fmt::format("{} is not a run directory: it has no config.toml", path));
  return RunDirectory(path, -1);
}

RunDirectory RunDirectory::Open(const std::string& path) {
  RunDirectory run = Attach(path);
  // A process that has just been killed may take a moment to be gone.
  for (int tries = 0; tries < 20 && run.lock_ < 0; ++tries) {
    if (tries > 0) std::this_thread::sleep_for(milliseconds(50));
    run.lock_ = TryLock(path);
  }
  if (run.lock_ < 0)
    Fail(fmt::format("{} is in use by {}. Wait for it to end, or stop it", path, LockOwner(path)));
  return run;
}

std::string RunDirectory::log_path(int rank) const {
  return fmt::format("{}/log/rank-{}.log", path_, rank);
}

std::string RunDirectory::memory_path(int64_t step, int rank) const {
  return fmt::format("{}/log/memory-step-{}-rank-{}.txt", path_, step, rank);
}

void RunDirectory::Remove() {
  // Out of its name first: what is half deleted must not look like a run.
  std::error_code error;
  std::string doomed = Normal(path_).string() + std::string(kPartial) + "XXXXXX";
  if (mkdtemp(doomed.data()) == nullptr) return;
  fs::rename(Normal(path_), doomed, error);
  fs::remove_all(doomed, error);
}

RunDirectory::RunDirectory(RunDirectory&& other) noexcept
    : path_(std::move(other.path_)), lock_(std::exchange(other.lock_, -1)) {}

RunDirectory::~RunDirectory() {
  if (lock_ >= 0) close(lock_);
}

}  // namespace shoal
