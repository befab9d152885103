#include "data/token_source.h"

#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "core/base/error.h"
#include "data/hdf5_file.h"
#include "data/indexed_file.h"
#include "data/text_source.h"

namespace shoal {
namespace {

bool IsFile(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

}  // namespace

std::shared_ptr<const TokenSource> OpenCorpus(const CorpusOptions& options) {
  const std::string& path = options.path;
  if (path.empty())
    SHOAL_FAIL(ErrorKind::kData, "data", "no path to the data: set data.path to text or token ids");
  if (path.ends_with(".h5") || path.ends_with(".hdf5") || IsHdf5(path)) return OpenHdf5(options);
  CorpusOptions pair = options;
  if (path.ends_with(".idx") || (path.ends_with(".bin") && !options.binary)) {
    pair.path.resize(path.size() - 4);
    return OpenIndexed(pair);
  }
  const bool bin = IsFile(path + ".bin"), idx = IsFile(path + ".idx");
  std::error_code error;
  // A pair is what was made from the text of the same name, so it goes first.
  if ((bin && idx) || ((bin || idx) && !std::filesystem::exists(path, error)))
    return OpenIndexed(pair);
  return OpenText(options);
}

std::string Fingerprint(const TokenSource& source) {
  constexpr int64_t kAll = int64_t{1} << 24, kRun = 4096, kRuns = 4096;
  const int64_t n = source.size();
  XXH3_state_t* const state = XXH3_createState();
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> owner(state, XXH3_freeState);
  XXH3_128bits_reset(state);
  XXH3_128bits_update(state, &n, sizeof(n));
  std::vector<int32_t> run(kRun);
  const auto add = [&](int64_t begin) {
    const std::span<int32_t> part = std::span(run).first(std::min(kRun, n - begin));
    source.Read(begin, part);
    XXH3_128bits_update(state, part.data(), part.size_bytes());
  };
  if (n <= kAll) {
    for (int64_t begin = 0; begin < n; begin += kRun) add(begin);
  } else {
    // First and last run included. In double the products stay exact enough to be distinct.
    for (int64_t i = 0; i < kRuns; ++i)
      add(static_cast<int64_t>(static_cast<double>(n - kRun) * static_cast<double>(i) /
                               static_cast<double>(kRuns - 1)));
  }
  const XXH128_hash_t hash = XXH3_128bits_digest(state);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace shoal
