#include "data/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace shoal {
namespace {

namespace fs = std::filesystem;

std::string Reason() { return std::strerror(errno); }

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// The length of the UTF-8 character at p, 0 if there is none (RFC 3629: no overlong forms, no
// surrogates, nothing above U+10FFFF).
int Utf8Length(const unsigned char* p, const unsigned char* end) {
  const auto tail = [&](int i) { return p + i < end && (p[i] & 0xC0) == 0x80; };
  if (p[0] < 0x80) return 1;
  if (p[0] < 0xC2) return 0;
  if (p[0] < 0xE0) return tail(1) ? 2 : 0;
  if (p[0] < 0xF0) {
    if (!tail(1) || !tail(2)) return 0;
    if (p[0] == 0xE0 && p[1] < 0xA0) return 0;
    if (p[0] == 0xED && p[1] >= 0xA0) return 0;
    return 3;
  }
  if (p[0] > 0xF4 || !tail(1) || !tail(2) || !tail(3)) return 0;
  if (p[0] == 0xF0 && p[1] < 0x90) return 0;
  if (p[0] == 0xF4 && p[1] >= 0x90) return 0;
  return 4;
}

void CheckText(std::string_view text, const std::string& path) {
  constexpr const char* kForce =
      "Give text in UTF-8, or set data.binary = true to train on the bytes as they are";
  if (const void* nul = std::memchr(text.data(), 0, text.size())) {
    SHOAL_FAIL(ErrorKind::kData, "text", "{} is not text: byte {} is NUL. {}", path,
               static_cast<const char*>(nul) - text.data(), kForce);
  }
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const unsigned char* const end = begin + text.size();
  int64_t bad = 0, first = -1;
  for (const unsigned char* p = begin; p < end;) {
    uint64_t word = 0x80;
    if (end - p >= 8) std::memcpy(&word, p, 8);
    if ((word & 0x8080808080808080ull) == 0) {
      p += 8;
      continue;
    }
    const int length = Utf8Length(p, end);
    if (length == 0) {
      if (bad++ == 0) first = p - begin;
      ++p;
    } else {
      p += length;
    }
  }
  if (bad * 10 > static_cast<int64_t>(text.size())) {
    SHOAL_FAIL(ErrorKind::kData, "text",
               "{} is not text: {} of its {} bytes are not UTF-8, the first at byte {}. {}", path,
               bad, text.size(), first, kForce);
  }
}

}  // namespace

FileBytes::FileBytes(const std::string& path, int64_t copy_limit) {
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status;
  if (file.get() < 0 || fstat(file.get(), &status) != 0)
    SHOAL_FAIL(ErrorKind::kData, "data", "cannot read {}: {}", path, Reason());
  if (!S_ISREG(status.st_mode))
    SHOAL_FAIL(ErrorKind::kData, "data", "{} is not a regular file", path);
  size_ = status.st_size;
  if (size_ > copy_limit) {
    const size_t length = static_cast<size_t>(size_);
    void* map = mmap(nullptr, length, PROT_READ, MAP_SHARED, file.get(), 0);
    if (map == MAP_FAILED)
      SHOAL_FAIL(ErrorKind::kData, "data", "cannot map the {} bytes of {}: {}", size_, path,
                 Reason());
    data_ = std::shared_ptr<const char[]>(static_cast<const char*>(map), [length](const char* p) {
      munmap(const_cast<char*>(p), length);
    });
    return;
  }
  std::shared_ptr<char[]> copy(new char[size_ + 1]);
  for (int64_t done = 0; done < size_;) {
    const ssize_t n = pread(file.get(), copy.get() + done, static_cast<size_t>(size_ - done), done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) SHOAL_FAIL(ErrorKind::kData, "data", "cannot read {}: {}", path, Reason());
    if (n == 0)
      SHOAL_FAIL(ErrorKind::kData, "data", "{} became shorter while it was being read", path);
    done += n;
  }
  data_ = std::move(copy);
}

std::vector<std::string> ListTextFiles(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found)
    SHOAL_FAIL(
        ErrorKind::kData, "text",
        "{} does not exist. Data is a text file, a directory of text, an .h5 of token ids or "
        "the prefix of a .bin and an .idx",
        path);
  if (error) SHOAL_FAIL(ErrorKind::kData, "text", "cannot read {}: {}", path, error.message());
  if (!fs::is_directory(status)) {
    if (fs::is_regular_file(status) && fs::file_size(path, error) == 0)
      SHOAL_FAIL(ErrorKind::kData, "text", "{} is empty: there is no text to learn from", path);
    return {path};
  }
  std::vector<std::string> files;
  fs::recursive_directory_iterator it(path, error), end;
  for (; !error && it != end; it.increment(error)) {
    if (it->path().filename().string().front() == '.') {
      it.disable_recursion_pending();
      continue;
    }
    std::error_code ignored;
    if (it->is_regular_file(ignored) && it->file_size(ignored) > 0)
      files.push_back(it->path().string());
  }
  if (error) SHOAL_FAIL(ErrorKind::kData, "text", "cannot read {}: {}", path, error.message());
  if (files.empty())
    SHOAL_FAIL(ErrorKind::kData, "text", "the directory {} holds no text: no file in it has a byte",
               path);
  std::sort(files.begin(), files.end());
  return files;
}

FileBytes ReadTextFile(const std::string& path, bool binary) {
  FileBytes bytes(path);
  if (!binary) CheckText(bytes.text(), path);
  return bytes;
}

}  // namespace shoal
