// The one error type. Every failure a user can meet ends in an exit code of the program, so the
// code is part of the error: a library throws, launch/main.cc prints one block and exits.
#pragma once

#include <fmt/core.h>

#include <exception>
#include <string>
#include <utility>

namespace shoal {

// The values are the exit codes of the program.
enum class ErrorKind : int {
  kConfig = 2,    // the user's configuration or command line
  kBug = 70,      // a broken contract between parts of Shoal
  kHang = 71,     // a rank stopped answering
  kData = 72,     // the training data or the tokenizer
  kStorage = 73,  // run directory, checkpoint, disk
  kRequeue = 75,  // saved on request; start again to go on
  kMemory = 76,   // memory is exhausted, or the run's share of it
};

class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string op, std::string message, const char* file, int line);

  const char* what() const noexcept override { return text_.c_str(); }
  ErrorKind kind() const { return kind_; }
  const std::string& op() const { return op_; }            // "matmul", "config", ...
  const std::string& message() const { return message_; }  // what happened and what to do
  int rank() const { return rank_; }                       // the rank that threw; 0 when alone

 private:
  ErrorKind kind_;
  std::string op_, message_, text_;
  int rank_;
};

// The rank that errors and logs of this thread name. Set once by launch/ or RunSpmd.
void SetThreadRank(int rank);
int ThreadRank();

}  // namespace shoal

// SHOAL_FAIL(ErrorKind::kData, "text", "{} holds no text", path);
#define SHOAL_FAIL(kind, op, ...) \
  throw ::shoal::Error((kind), (op), ::fmt::format(__VA_ARGS__), __FILE__, __LINE__)
// SHOAL_CHECK(a == b, "matmul", "inner dimensions {} and {} differ", a, b); a broken contract.
#define SHOAL_CHECK(condition, op, ...)                        \
  do {                                                         \
    if (!(condition)) [[unlikely]]                             \
      SHOAL_FAIL(::shoal::ErrorKind::kBug, (op), __VA_ARGS__); \
  } while (false)
