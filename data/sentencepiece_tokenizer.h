// A SentencePiece model as a Tokenizer.
#pragma once

#include <memory>

#include "data/tokenizer.h"

namespace shoal {

class SentencePieceTokenizer final : public Tokenizer {
 public:
  explicit SentencePieceTokenizer(const std::string& path);
  ~SentencePieceTokenizer() override;

  // Uses KernelThreads() threads; the ids do not depend on how many.
  void EncodeTo(std::string_view text, const Sink& sink) const override;
  std::string Decode(std::span<const int32_t> ids) const override;
  int32_t vocab_size() const override;
  int32_t end_of_document() const override;
  std::string name() const override { return path_; }

 private:
  std::vector<int32_t> EncodeShare(std::string_view text, bool first) const;

  struct Model;  // keeps the library's header out of this one

  std::string path_;
  std::unique_ptr<Model> model_;
};

}  // namespace shoal
