// A long range of memory of one process that others of its host can map. It has no name anywhere:
// it goes with the last process that maps it, whatever ends them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace shoal {

class SharedRange {
 public:
  // A new one of `bytes`, which cost address space only until they are touched; fewer where a limit
  // says so. Null where the system has no such memory.
  static std::shared_ptr<SharedRange> Create(size_t bytes);
  // The same memory as of the range that `ticket` is from, in this process. Null if it cannot be
  // had: another host, another user, a closed range, no address space.
  static std::shared_ptr<SharedRange> Open(const std::string& ticket);
  ~SharedRange();
  SharedRange(const SharedRange&) = delete;
  SharedRange& operator=(const SharedRange&) = delete;

  // What another process needs to open the range, until Close.
  std::string ticket() const;
  // No process can open it any more. Those that have keep it.
  void Close();

  char* begin() const { return begin_; }
  size_t size() const { return size_; }
  bool Holds(const void* data, size_t bytes) const {
    const char* at = static_cast<const char*>(data);
    return at >= begin_ && bytes <= size_ && at <= begin_ + (size_ - bytes);
  }
  // The first `bytes` are going to be used: puts huge pages there if the system has them for shared
  // memory. No more than a hint; not thread-safe.
  void Prepare(size_t bytes);

 private:
  SharedRange(int file, size_t size, void* reserved, size_t reserved_size, char* begin)
      : file_(file),
        size_(size),
        reserved_(reserved),
        reserved_size_(reserved_size),
        begin_(begin) {}
  // Maps `size` bytes of `file` at a multiple of a huge page. Takes the file over.
  static std::shared_ptr<SharedRange> Map(int file, size_t size);

  int file_;  // -1: closed
  size_t size_;
  void* reserved_;
  size_t reserved_size_;
  char* begin_;
  size_t prepared_ = 0;
  bool collapse_ = true;  // false once the system has refused
};

}  // namespace shoal
