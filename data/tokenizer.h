// From text to token ids and back. A tokenizer is immutable: all methods may be called from
// several threads at once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace shoal {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  std::vector<int32_t> Encode(std::string_view text) const;
  // The same ids part by part, in order, for texts of any size in little memory.
  using Sink = std::function<void(std::span<const int32_t> ids)>;
  virtual void EncodeTo(std::string_view text, const Sink& sink) const = 0;
  // Ids without text (document end, padding) decode to nothing, ids outside the vocabulary to
  // U+FFFD: a model's vocabulary may be larger than its tokenizer's, and a fresh model samples
  // from all of it.
  virtual std::string Decode(std::span<const int32_t> ids) const = 0;
  virtual int32_t vocab_size() const = 0;
  // The id that is put after every document.
  virtual int32_t end_of_document() const = 0;
  virtual std::string name() const = 0;  // what MakeTokenizer takes
  // True where Encode is the identity on bytes, so that a text file needs no second copy.
  virtual bool ids_are_bytes() const { return false; }
};

// Ids 0-255 are the bytes, 256 ends a document.
class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr int32_t kEndOfDocument = 256;

  void EncodeTo(std::string_view text, const Sink& sink) const override;
  std::string Decode(std::span<const int32_t> ids) const override;
  int32_t vocab_size() const override { return 257; }
  int32_t end_of_document() const override { return kEndOfDocument; }
  std::string name() const override { return "bytes"; }
  bool ids_are_bytes() const override { return true; }
};

// "bytes", or the path of a SentencePiece model.
std::unique_ptr<Tokenizer> MakeTokenizer(const std::string& name);

struct SentencePieceTraining {
  std::string input;                 // a text file or a directory of text
  int64_t vocab_size = 0;            // pieces, the 256 bytes and 3 control pieces included
  std::string output_prefix;         // writes PREFIX.model, whole or not at all
  bool binary = false;               // as CorpusOptions::binary
  int64_t sample_bytes = 256 << 20;  // text beyond this is thinned evenly, line by line
};
// Trains byte-pair pieces that reproduce any text exactly: no normalisation, unknown characters
// as bytes. The result depends on nothing but the text and these options. Returns the model's path.
std::string TrainSentencePiece(const SentencePieceTraining& options);

}  // namespace shoal
