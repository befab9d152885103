// Ranges of a file, read and written whole, and what a full disk does to a writer: it waits.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace shoal {

// How long, and how loudly, a writer waits for space (ENOSPC, EDQUOT, or a limit on files' size).
struct FullDisk {
  double seconds = 0;  // then Error(kStorage)
  // Called at once and every few seconds with a line that says what is needed; from the writer's
  // thread.
  std::function<void(const std::string&)> warn;
  // True: nobody wants the file any more; the writer stops with Error(kStorage).
  std::function<bool()> cancelled;
};

// Throws Error(kStorage), "PATH: WHAT".
[[noreturn]] void FailFile(const std::string& path, const std::string& what);

// Errors are of FailFile.
class File {
 public:
  static File Create(const std::string& path);  // which must not be there
  static File Open(const std::string& path);    // to read; a regular file
  static File OpenToAppend(const std::string& path);
  ~File();
  File(File&& other) noexcept;
  File& operator=(File&&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const;
  // All or nothing of it; a file that ends before is an error.
  void Read(void* data, int64_t bytes, int64_t at) const;
  // Takes the space for `bytes` at once, so that a full disk is found before there is work to lose.
  void Reserve(int64_t bytes, const FullDisk& full_disk);
  void Write(const void* data, int64_t bytes, int64_t at, const FullDisk& full_disk);
  // Where the last one ended; at the end of a file that was opened to append.
  void Append(const void* data, int64_t bytes, const FullDisk& full_disk);
  // The same, by the disk itself where the file system lets it read `data`: whole pages whose place
  // in memory and in the file is a multiple of kDirectBytes. A copy through the system's cache
  // takes more of a processor than all else in a save. What cannot go this way is sent to the disk
  // at once, too. For one thread at a time.
  void WriteDirect(const void* data, int64_t bytes, int64_t at, const FullDisk& full_disk);
  void Flush() const;  // to the disk

 private:
  File(std::string path, int file) : path_(std::move(path)), file_(file) {}
  template <class Put>
  void PutAll(int64_t bytes, const FullDisk& full_disk, const Put& put);

  std::string path_;
  int file_;
  int direct_ = kNotOpen;  // the same file, past the cache
  static constexpr int kNotOpen = -1, kNotPossible = -2;
};

inline constexpr int64_t kDirectBytes = 4096;

}  // namespace shoal
