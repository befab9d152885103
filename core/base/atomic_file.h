// Writing a file that is whole or absent.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace shoal {

// Written under a temporary name; Commit makes it durable and gives it its own name. Destroyed
// without Commit, it leaves nothing behind.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void Write(const void* data, size_t bytes);
  void Flush();  // hands all to the file, so that it can be read by its temporary path
  void Commit();
  // For a library that writes by name; it must have closed the file before Commit.
  const std::string& temporary_path() const { return temporary_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_, temporary_;
  std::vector<char> buffer_;
  int file_ = -1;
};

// Makes the names in a directory durable; Error(kStorage) if that fails. A file system that cannot
// sync one, or lets nobody read it, has made its own promise.
void SyncDirectory(const std::string& path);

}  // namespace shoal
