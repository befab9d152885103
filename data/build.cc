#include "data/build.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <limits>

#include "core/base/build_config.h"
#include "core/base/error.h"
#include "data/array_source.h"
#include "data/file.h"
#include "data/hdf5_file.h"
#include "data/indexed_file.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

bool IsHdf5Name(const std::string& path) {
  return path.ends_with(".h5") || path.ends_with(".hdf5");
}

// The output without the ending that names its format.
std::string Prefix(const std::string& output) {
  for (const std::string ending : {".bin", ".idx", ".h5", ".hdf5"})
    if (output.ends_with(ending)) return output.substr(0, output.size() - ending.size());
  return output;
}

void Remove(const std::string& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error)
    SHOAL_FAIL(ErrorKind::kStorage, "data build", "cannot remove {}: {}", path, error.message());
}

void Rename(const std::string& from, const std::string& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error)
    SHOAL_FAIL(ErrorKind::kStorage, "data build", "cannot write {}: {}", to, error.message());
}

struct TemporaryFile {
  std::string path;
  ~TemporaryFile() {
    std::error_code ignored;
    if (!path.empty()) fs::remove(path, ignored);
  }
};

void CheckOutput(const BuildOptions& options, const std::vector<std::string>& files) {
  if (Prefix(options.output).empty() || Prefix(options.output).ends_with("/"))
    SHOAL_FAIL(ErrorKind::kConfig, "data build",
               "the output \"{}\" has no name: give x.h5, or a prefix for .bin and .idx",
               options.output);
  const fs::path folder = fs::path(options.output).parent_path();
  std::error_code error;
  if (!folder.empty() && !fs::is_directory(folder, error))
    SHOAL_FAIL(ErrorKind::kStorage, "data build", "the directory {} does not exist",
               folder.string());
  for (const std::string& file : files)
    if (!options.overwrite && fs::exists(file, error))
      SHOAL_FAIL(ErrorKind::kStorage, "data build",
                 "{} exists. Give another name, or --overwrite to replace it", file);
}

}  // namespace

BuildResult BuildDataset(const BuildOptions& options) {
  const bool hdf5 = IsHdf5Name(options.output);
  const std::string prefix = Prefix(options.output);
  BuildResult result{.tokenizer = options.tokenizer};
  result.files = hdf5 ? std::vector{options.output} : std::vector{prefix + ".bin", prefix + ".idx"};
  if (options.train_vocab > 0) {
    if (result.tokenizer.empty() || result.tokenizer == "bytes")
      result.tokenizer = prefix + ".model";
    if (!result.tokenizer.ends_with(".model"))
      SHOAL_FAIL(ErrorKind::kConfig, "data build",
                 "the model to train is to be written to \"{}\", which does not end in .model",
                 result.tokenizer);
    result.files.push_back(result.tokenizer);
  }
  CheckOutput(options, result.files);
  if (hdf5 && !kHaveHdf5)
    SHOAL_FAIL(ErrorKind::kConfig, "data build",
               "this build of Shoal leaves HDF5 out: give a prefix for .bin and .idx instead of {}",
               options.output);
  // Before anything is written, all inputs are found and the tokenizer is there. A model that is
  // trained here gets its name with the data that it made, not before.
  const std::vector<std::string> paths = ListTextFiles(options.input);
  TemporaryFile model;
  if (options.train_vocab > 0)
    model.path = TrainSentencePiece(
        {.input = options.input,
         .vocab_size = options.train_vocab,
         .output_prefix = fmt::format("{}.partial-{}", result.tokenizer, getpid()),
         .binary = options.binary});
  const std::unique_ptr<Tokenizer> tokenizer =
      MakeTokenizer(model.path.empty() ? result.tokenizer : model.path);
  result.vocab = tokenizer->vocab_size();
  const IntType type = TypeForVocab(result.vocab);
  result.dtype = Name(type);

  // The ids in the order of the text: the .bin itself, or what becomes the HDF5 dataset.
  AtomicFile ids_file(hdf5 ? options.output + ".ids" : prefix + ".bin");
  std::vector<int64_t> starts;
  std::vector<char> packed;
  const auto add = [&](std::span<const int32_t> ids) {
    packed.clear();
    AppendAs(type, ids, packed);
    ids_file.Write(packed.data(), packed.size());
    result.tokens += static_cast<int64_t>(ids.size());
  };
  const int32_t end = tokenizer->end_of_document();
  for (const std::string& path : paths) {
    const FileBytes text = ReadTextFile(path, options.binary);
    starts.push_back(result.tokens);
    tokenizer->EncodeTo(text.text(), add);
    add({&end, 1});
    result.text_bytes += text.size();
  }
  result.documents = static_cast<int64_t>(starts.size());

  // Old data goes before what it belongs to is replaced (its .bin, its model), and new data appears
  // last: at no time is there a file that reads well and means something else.
  const std::string& last = hdf5 ? result.files[0] : result.files[1];
  const auto publish_model = [&] {
    if (model.path.empty()) return;
    Remove(last);
    Rename(model.path, result.tokenizer);
  };
  if (hdf5) {
    ids_file.Flush();
    const FileBytes ids(ids_file.temporary_path(), 0);
    AtomicFile target(last);
    WriteHdf5({type, ids.data(), result.tokens, ids.owner()}, starts, end, target);
    publish_model();
    target.Commit();
  } else {
    AtomicFile index(last);
    WriteIndex(type, starts, result.tokens, index);
    index.Flush();
    publish_model();
    Remove(last);
    ids_file.Commit();
    index.Commit();
  }
  return result;
}

DatasetSummary InspectDataset(const CorpusOptions& options, int max_samples,
                              int64_t sample_tokens) {
  const std::shared_ptr<const TokenSource> source = OpenCorpus(options);
  DatasetSummary summary{.info = source->info(), .tokens = source->size()};
  summary.documents = summary.info.documents;
  summary.fingerprint = Fingerprint(*source);
  summary.smallest_id = std::numeric_limits<int32_t>::max();
  const std::optional<int32_t> end = summary.info.end_of_document;
  int64_t ends = 0;
  std::vector<int32_t> block(1 << 16);
  for (int64_t begin = 0; begin < source->size(); begin += static_cast<int64_t>(block.size())) {
    const std::span<int32_t> part = std::span(block).first(
        std::min<int64_t>(static_cast<int64_t>(block.size()), source->size() - begin));
    source->Read(begin, part);
    const auto [low, high] = std::minmax_element(part.begin(), part.end());
    summary.smallest_id = std::min(summary.smallest_id, *low);
    summary.largest_id = std::max(summary.largest_id, *high);
    if (end) ends += std::count(part.begin(), part.end(), *end);
  }
  if (summary.documents < 0 && end) summary.documents = ends;
  if (!options.tokenizer) return summary;
  for (int64_t begin = 0;
       begin < source->size() && static_cast<int>(summary.samples.size()) < max_samples;) {
    const int64_t limit = std::min(source->size(), begin + sample_tokens);
    const int64_t stop = source->has_documents() ? source->NextDocument(begin, limit) : limit;
    std::vector<int32_t> ids(stop - begin);
    source->Read(begin, ids);
    summary.samples.push_back(options.tokenizer->Decode(ids));
    begin = source->has_documents() ? source->NextDocument(begin, source->size()) : stop;
  }
  return summary;
}

}  // namespace shoal
