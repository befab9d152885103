// What a save says about itself: manifest.json, which names every file with its size, and every
// tensor with the pieces that it was written in. A manifest that has been read is whole: it carries
// its own digest, and all that it states has been held against itself.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/digest.h"
#include "checkpoint/hdf5_file.h"
#include "checkpoint/store.h"
#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

inline constexpr const char* kManifest = "manifest.json";
// Bytes of a piece that have a digest of their own: what is read and checked at once.
inline constexpr int64_t kChunkBytes = int64_t{8} << 20;

// 42 of "step-00000042", or of that and `ending`; nothing of other names.
std::optional<int64_t> StepOfName(std::string_view name, std::string_view ending = "");

// Which part of a tensor is meant: elements [begin, begin + count) of a slice of it.
struct Piece {
  Dims global, offset, slice;
  int64_t begin = 0, count = 0;
};
Piece PieceOf(const StateEntry& entry);

// Elements that follow each other both in the whole tensor and in the piece.
struct Range {
  int64_t global, local, count;
};
// In rising order of both.
std::vector<Range> RangesOf(const Piece& piece);

struct StoredPiece {
  Piece piece;
  std::string file;
  int64_t at = 0;                    // of its bytes in the file
  std::vector<std::string> digests;  // of each chunk
};
struct StoredTensor {
  DType dtype = DType::kF32;
  Dims shape;
  std::vector<StoredPiece> pieces;
};
struct StoredFile {
  int64_t bytes = 0;
  std::string frame;  // digest of what lies between the pieces
};

// What one rank has written.
struct Part {
  std::map<std::string, StoredFile> files;
  std::map<std::string, StoredTensor> tensors;
};
std::string PartToText(const Part& part);

struct Manifest {
  SaveInfo info;
  Part all;
};
// The manifest of a save that these parts make up, as text.
std::string ManifestText(const SaveInfo& info, const std::vector<std::string>& parts);
// Error(kStorage) naming the file if it is missing, damaged, of another format, or of another step
// than the save's name says.
Manifest ReadManifest(const std::string& save);

// The pieces of each file, as ranges of it.
std::map<std::string, std::vector<Extent>> ExtentsOf(const Part& part);

}  // namespace shoal
