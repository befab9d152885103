#include "data/text_source.h"

#include <algorithm>
#include <limits>

#include "core/base/error.h"
#include "data/array_source.h"
#include "data/file.h"

namespace shoal {
namespace {

// Token i of a document is its byte i; after the last comes the document end.
class ByteTextSource final : public TokenSource {
 public:
  ByteTextSource(SourceInfo info, std::vector<std::string> paths, const CorpusOptions& options)
      : paths_(std::move(paths)), limit_(options.vocab > 0 ? options.vocab : 257) {
    info_ = std::move(info);
    for (const std::string& path : paths_) {
      files_.push_back(ReadTextFile(path, options.binary));
      starts_.push_back(size_);
      size_ += files_.back().size() + 1;
      info_.stored_bytes += files_.back().size();
    }
    // Only a vocabulary without the document end is too small for bytes; say where it shows.
    if (limit_ <= ByteTokenizer::kEndOfDocument) {
      std::vector<int32_t> block(1 << 16);
      for (int64_t i = 0; i < size_; i += static_cast<int64_t>(block.size()))
        Read(i, std::span(block).first(std::min<int64_t>(block.size(), size_ - i)));
    }
  }

  int64_t size() const override { return size_; }

  void Read(int64_t begin, std::span<int32_t> out) const override {
    SHOAL_CHECK(begin >= 0 && begin + static_cast<int64_t>(out.size()) <= size_, "data",
                "tokens {} to {} of a corpus of {}", begin, begin + out.size(), size_);
    size_t document = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    size_t done = 0;
    for (int64_t offset = begin - starts_[document]; done < out.size(); ++document, offset = 0) {
      const std::string_view text = files_[document].text().substr(offset);
      const size_t count = std::min(text.size(), out.size() - done);
      for (size_t i = 0; i < count; ++i) out[done + i] = static_cast<unsigned char>(text[i]);
      done += count;
      if (done < out.size()) out[done++] = ByteTokenizer::kEndOfDocument;
    }
    if (limit_ <= ByteTokenizer::kEndOfDocument)
      for (size_t i = 0; i < out.size(); ++i)
        if (out[i] >= limit_) Fail(begin + static_cast<int64_t>(i), out[i]);
  }

  bool has_documents() const override { return true; }
  int64_t NextDocument(int64_t position, int64_t limit) const override {
    return std::min(NextStart(starts_, position), limit);
  }

 private:
  [[noreturn]] void Fail(int64_t position, int32_t id) const {
    const size_t document =
        std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
    FailBadId(paths_[document], position - starts_[document], fmt::format("{}", id), limit_);
  }

  std::vector<std::string> paths_;
  std::vector<FileBytes> files_;
  std::vector<int64_t> starts_;
  int64_t size_ = 0, limit_;
};

}  // namespace

std::shared_ptr<const TokenSource> OpenText(const CorpusOptions& options) {
  std::vector<std::string> paths = ListTextFiles(options.path);
  SHOAL_CHECK(options.tokenizer, "data", "{} is text and needs a tokenizer", options.path);
  const Tokenizer& tokenizer = *options.tokenizer;
  SourceInfo info{.path = options.path, .format = "text", .dtype = "bytes"};
  info.documents = static_cast<int64_t>(paths.size());
  const int32_t end = tokenizer.end_of_document();
  info.end_of_document = end;
  if (tokenizer.ids_are_bytes())
    return std::make_shared<ByteTextSource>(std::move(info), std::move(paths), options);

  PackedTokens tokens(tokenizer.vocab_size());
  std::vector<int64_t> starts;
  for (const std::string& path : paths) {
    const FileBytes bytes = ReadTextFile(path, options.binary);
    starts.push_back(tokens.size());
    tokenizer.EncodeTo(bytes.text(), [&](std::span<const int32_t> ids) { tokens.Add(ids); });
    tokens.Add({&end, 1});
    info.stored_bytes += bytes.size();
  }
  TokenArray array = std::move(tokens).Finish();
  info.dtype = Name(array.type);
  return std::make_shared<ArraySource>(
      std::move(info), std::move(array), options.vocab,
      [starts = std::move(starts)](int64_t position) { return NextStart(starts, position); });
}

}  // namespace shoal
