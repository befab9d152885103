#include "data/sentencepiece_tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <filesystem>
#include <future>

#include "core/base/error.h"
#include "core/base/thread_count.h"
#include "data/file.h"

namespace shoal {
namespace {

// Texts are encoded in parts that begin with a line break, which hardly any model's pieces cross:
// of few lines, because the library's merging slows down with length (4 times from 2 KiB to
// 1 MiB), and a share of many parts for each thread.
constexpr size_t kPartBytes = 2 << 10, kShareBytes = 256 << 10;
constexpr int kAlwaysQuiet = 100;  // above every level the library logs at

// Where a part of at least `size` bytes ends: before the first line break of a row, or with the
// text.
size_t PartEnd(std::string_view text, size_t begin, size_t size) {
  if (text.size() - begin <= size) return text.size();
  size_t end = text.find('\n', begin + size);
  while (end != std::string_view::npos && text[end - 1] == '\n') end = text.find('\n', end + 1);
  return std::min(end, text.size());
}

// What the library says, without the place in its source that it puts before.
std::string Message(const sentencepiece::util::Status& status) {
  const std::string text = status.message();
  const size_t place = text.rfind("] ");
  return place == std::string::npos ? text : text.substr(place + 2);
}

// The lines of a corpus for the trainer, cut to a length that it does not discard, thinned to
// `keep` of every `of` bytes.
class Lines final : public sentencepiece::SentenceIterator {
 public:
  Lines(const std::vector<FileBytes>& files, int64_t keep, int64_t of)
      : files_(files), keep_(keep), of_(of) {
    Next();
  }
  bool done() const override { return done_; }
  const std::string& value() const override { return line_; }
  sentencepiece::util::Status status() const override { return {}; }
  void Next() override {
    while (Advance()) {
      // Takes a line whenever the share taken so far has fallen behind: even, and without chance.
      const int64_t length = static_cast<int64_t>(line_.size());
      seen_ += length;
      if (length == 0 || static_cast<double>(taken_ + length) * static_cast<double>(of_) >
                             static_cast<double>(seen_) * static_cast<double>(keep_))
        continue;
      taken_ += length;
      return;
    }
    done_ = true;
  }

 private:
  static constexpr size_t kLongest = 4000;

  bool Advance() {
    while (file_ < files_.size() && at_ >= static_cast<size_t>(files_[file_].size())) {
      ++file_;
      at_ = 0;
    }
    if (file_ == files_.size()) return false;
    const std::string_view rest = files_[file_].text().substr(at_);
    size_t length = std::min(rest.find('\n'), rest.size());
    size_t step = length + 1;
    if (length > kLongest) {
      length = kLongest;
      const size_t space = rest.substr(0, length).rfind(' ');
      if (space != std::string_view::npos && space > 0) length = space;
      while (length > 1 && (rest[length] & 0xC0) == 0x80) --length;
      step = length;
    }
    line_.assign(rest.substr(0, length));
    at_ += step;
    return true;
  }

  const std::vector<FileBytes>& files_;
  int64_t keep_, of_, seen_ = 0, taken_ = 0;
  size_t file_ = 0, at_ = 0;
  std::string line_;
  bool done_ = false;
};

}  // namespace

struct SentencePieceTokenizer::Model {
  sentencepiece::SentencePieceProcessor processor;
  // Whether the ids of a text are those of its parts, put together.
  bool parts = false;
  // The first id of a text that begins with a line break is only the space that the model puts
  // before every text.
  bool leading_space = false;

  void FindOutAboutParts() {
    const auto encode = [&](const std::string& text) {
      std::vector<int> ids;
      return processor.Encode(text, &ids).ok() ? ids : std::vector<int>();
    };
    const std::vector<int> line_break = encode("\n");
    leading_space = line_break.size() >= 2 && line_break[0] == processor.PieceToId("\xE2\x96\x81");
    // Some models drop spaces at the ends of a text that they would keep within it.
    parts = true;
    for (const std::string left : {"a", "a "}) {
      for (const std::string right : {"\na", "\n a"}) {
        std::vector<int> joined = encode(left);
        const std::vector<int> second = encode(right);
        joined.insert(joined.end(), second.begin() + (leading_space && !second.empty()),
                      second.end());
        parts = parts && joined == encode(left + right);
      }
    }
    for (int id = 0; id < processor.GetPieceSize(); ++id) {
      const std::string& piece = processor.IdToPiece(id);
      if (piece.find('\n', 1) != std::string::npos &&
          piece.find_first_not_of('\n') != std::string::npos)
        parts = false;
    }
  }
};

SentencePieceTokenizer::SentencePieceTokenizer(const std::string& path)
    : path_(path), model_(std::make_unique<Model>()) {
  std::error_code error;
  if (!std::filesystem::exists(path, error))
    SHOAL_FAIL(ErrorKind::kData, "tokenizer",
               "{} does not exist. data.tokenizer is \"bytes\" or the path of a SentencePiece "
               "model; `shoal data build` trains one",
               path);
  const FileBytes bytes(path);
  std::string problem;
  if (bytes.size() == 0) {
    problem = "the file is empty";
  } else if (const auto status = model_->processor.LoadFromSerializedProto(bytes.text());
             !status.ok()) {
    problem = Message(status);
    if (problem.empty()) problem = "it is damaged or of another kind";
  } else if (model_->processor.GetPieceSize() <= 0) {
    problem = "it has no pieces";
  }
  if (!problem.empty())
    SHOAL_FAIL(ErrorKind::kData, "tokenizer", "{} is no SentencePiece model: {}", path, problem);
  if (model_->processor.eos_id() < 0)
    SHOAL_FAIL(ErrorKind::kData, "tokenizer",
               "{} has no end-of-sentence piece, which ends documents here. Train the model with "
               "one (eos_id >= 0)",
               path);
  model_->FindOutAboutParts();
}

SentencePieceTokenizer::~SentencePieceTokenizer() = default;

std::vector<int32_t> SentencePieceTokenizer::EncodeShare(std::string_view text, bool first) const {
  std::vector<int32_t> all;
  std::vector<int> ids;
  for (size_t begin = 0; begin < text.size(); first = false) {
    const size_t end = model_->parts ? PartEnd(text, begin, kPartBytes) : text.size();
    const auto status = model_->processor.Encode(text.substr(begin, end - begin), &ids);
    if (!status.ok())
      SHOAL_FAIL(ErrorKind::kData, "tokenizer", "{} cannot encode: {}", path_, Message(status));
    const bool drop = !first && model_->leading_space && !ids.empty();
    all.insert(all.end(), ids.begin() + drop, ids.end());
    begin = end;
  }
  return all;
}

void SentencePieceTokenizer::EncodeTo(std::string_view text, const Sink& sink) const {
  const size_t threads = static_cast<size_t>(KernelThreads());
  for (size_t begin = 0; begin < text.size();) {
    std::vector<std::future<std::vector<int32_t>>> shares;
    while (shares.size() < threads && begin < text.size()) {
      const size_t end = model_->parts ? PartEnd(text, begin, kShareBytes) : text.size();
      // The last share is this thread's own.
      const bool own = shares.size() + 1 == threads || end == text.size();
      shares.push_back(std::async(own ? std::launch::deferred : std::launch::async,
                                  [this, share = text.substr(begin, end - begin),
                                   first = begin == 0] { return EncodeShare(share, first); }));
      begin = end;
    }
    shares.back().wait();
    for (auto& share : shares) sink(share.get());
  }
}

std::string SentencePieceTokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text, part;
  const auto is_known = [&](int32_t id) { return id >= 0 && id < vocab_size(); };
  for (size_t begin = 0; begin < ids.size();) {
    if (!is_known(ids[begin])) {
      text += "\xEF\xBF\xBD";
      ++begin;
      continue;
    }
    const auto end = std::find_if_not(ids.begin() + begin, ids.end(), is_known);
    const std::vector<int> run(ids.begin() + begin, end);
    const auto status = model_->processor.Decode(run, &part);
    if (!status.ok())
      SHOAL_FAIL(ErrorKind::kData, "tokenizer", "{} cannot decode: {}", path_, Message(status));
    text += part;
    begin += run.size();
  }
  return text;
}

int32_t SentencePieceTokenizer::vocab_size() const { return model_->processor.GetPieceSize(); }
int32_t SentencePieceTokenizer::end_of_document() const { return model_->processor.eos_id(); }

std::string TrainSentencePiece(const SentencePieceTraining& options) {
  if (options.vocab_size < 260)
    SHOAL_FAIL(ErrorKind::kData, "tokenizer",
               "a vocabulary of {} is too small: 256 bytes and 3 control pieces come first",
               options.vocab_size);
  std::vector<FileBytes> files;
  int64_t bytes = 0;
  for (const std::string& path : ListTextFiles(options.input)) {
    files.push_back(ReadTextFile(path, options.binary));
    bytes += files.back().size();
  }
  Lines lines(files, std::min(bytes, options.sample_bytes), bytes);
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      {{"model_type", "bpe"},
       {"vocab_size", fmt::format("{}", options.vocab_size)},
       {"normalization_rule_name", "identity"},
       {"remove_extra_whitespaces", "false"},
       {"add_dummy_prefix", "false"},
       {"byte_fallback", "true"},
       {"split_digits", "true"},
       {"character_coverage", "0.9999"},
       {"num_threads", "1"},
       {"minloglevel", fmt::format("{}", kAlwaysQuiet)}},
      &lines, &model);
  if (!status.ok())
    SHOAL_FAIL(ErrorKind::kData, "tokenizer", "cannot train {} pieces on {}: {}",
               options.vocab_size, options.input, Message(status));
  const std::string path = options.output_prefix + ".model";
  AtomicFile file(path);
  file.Write(model.data(), model.size());
  file.Commit();
  return path;
}

}  // namespace shoal
