#include "data/hdf5_file.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/base/build_config.h"
#include "core/base/error.h"
#include "data/file.h"

#if SHOAL_HAVE_HDF5
#include <hdf5.h>
#endif

namespace shoal {

bool IsHdf5(const std::string& path) {
  constexpr char kSignature[8] = {'\x89', 'H', 'D', 'F', '\r', '\n', '\x1a', '\n'};
  char begin[8] = {};
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return false;  // a pipe would block
  std::ifstream file(path, std::ios::binary);
  return file.read(begin, sizeof(begin)) && std::memcmp(begin, kSignature, sizeof(begin)) == 0;
}

#if SHOAL_HAVE_HDF5
namespace {

// Closes an identifier of the library.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() { Close(); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }
  bool Close() {
    const hid_t id = std::exchange(id_, -1);
    return id >= 0 && close_(id) >= 0;
  }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

// The library prints its error stack unless told not to; ours says it in one line.
class Quiet {
 public:
  Quiet() {
    H5dont_atexit();  // see checkpoint/hdf5_file.cc; the first call of HDF5 may be here
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~Quiet() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

// The innermost description on the library's error stack: "truncated file: eof = ...".
std::string Reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_DOWNWARD,
      [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
        if (error->desc && *error->desc) *static_cast<std::string*>(out) = error->desc;
        return 0;
      },
      &reason);
  return reason.empty() ? "no reason given" : reason;
}

struct IntDataset {
  std::string name;
  bool integer = false;
};

// Every dataset below the root, in the order of names.
std::vector<IntDataset> ListDatasets(hid_t file) {
  std::vector<IntDataset> found;
  H5Ovisit(
      file, H5_INDEX_NAME, H5_ITER_INC,
      [](hid_t root, const char* name, const H5O_info_t* info, void* out) -> herr_t {
        if (info->type != H5O_TYPE_DATASET) return 0;
        const Handle dataset(H5Dopen2(root, name, H5P_DEFAULT), H5Dclose);
        const Handle type(H5Dget_type(dataset), H5Tclose);
        const Handle space(H5Dget_space(dataset), H5Sclose);
        static_cast<std::vector<IntDataset>*>(out)->push_back(
            {name, H5Tget_class(type) == H5T_INTEGER && H5Sget_simple_extent_ndims(space) >= 1});
        return 0;
      },
      &found);
  return found;
}

std::string ChooseDataset(hid_t file, const std::string& path) {
  const std::vector<IntDataset> all = ListDatasets(file);
  std::string integers, others;
  int count = 0;
  for (const IntDataset& dataset : all) {
    if (dataset.integer && dataset.name == "tokens") return dataset.name;
    std::string& list = dataset.integer ? integers : others;
    list += (list.empty() ? "" : ", ") + dataset.name;
    count += dataset.integer;
  }
  if (count == 0)
    SHOAL_FAIL(ErrorKind::kData, "hdf5",
               "{} holds no dataset of integers{}. `shoal data build` makes one from text", path,
               others.empty() ? "" : " (only: " + others + ")");
  if (count > 1)
    SHOAL_FAIL(ErrorKind::kData, "hdf5",
               "{} holds several datasets of integers ({}). Name the one to read \"tokens\"", path,
               integers);
  return integers;
}

IntType TypeOf(hid_t type, const std::string& where) {
  const size_t size = H5Tget_size(type);
  const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
  for (const IntType t : {IntType::kU8, IntType::kU16, IntType::kU32, IntType::kU64})
    if (static_cast<size_t>(SizeOf(t)) == size)
      return static_cast<IntType>(static_cast<int>(t) + is_signed);
  SHOAL_FAIL(ErrorKind::kData, "hdf5", "{} has integers of {} bytes", where, size);
}

hid_t NativeType(IntType type) {
  const hid_t types[] = {H5T_NATIVE_UINT8,  H5T_NATIVE_INT8,  H5T_NATIVE_UINT16, H5T_NATIVE_INT16,
                         H5T_NATIVE_UINT32, H5T_NATIVE_INT32, H5T_NATIVE_UINT64, H5T_NATIVE_INT64};
  return types[static_cast<int>(type)];
}

// Where the ids of a contiguous dataset in native order lie in the file, or -1 for any other.
int64_t OffsetInFile(hid_t dataset, hid_t stored, IntType type) {
  const Handle plist(H5Dget_create_plist(dataset), H5Pclose);
  if (H5Pget_layout(plist) != H5D_CONTIGUOUS || H5Pget_external_count(plist) != 0 ||
      H5Tequal(stored, NativeType(type)) <= 0)
    return -1;
  const haddr_t offset = H5Dget_offset(dataset);
  return offset == HADDR_UNDEF ? -1 : static_cast<int64_t>(offset);
}

TokenArray Decode(hid_t dataset, IntType type, int64_t count, const std::string& where) {
  const int64_t bytes = count * SizeOf(type);
  std::shared_ptr<char[]> memory;
  try {
    memory.reset(new char[bytes]);
  } catch (const std::bad_alloc&) {
    SHOAL_FAIL(ErrorKind::kData, "hdf5",
               "{} needs {} bytes of memory, because it is chunked or compressed. Store it "
               "contiguous to have it mapped",
               where, bytes);
  }
  if (H5Dread(dataset, NativeType(type), H5S_ALL, H5S_ALL, H5P_DEFAULT, memory.get()) < 0)
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "cannot read {}: {}", where, Reason());
  return {type, memory.get(), count, memory};
}

std::vector<int64_t> ReadStarts(hid_t file, int64_t tokens, const std::string& path) {
  std::vector<int64_t> starts;
  if (H5Lexists(file, "documents", H5P_DEFAULT) <= 0) return starts;
  const Handle dataset(H5Dopen2(file, "documents", H5P_DEFAULT), H5Dclose);
  const Handle type(H5Dget_type(dataset), H5Tclose);
  const Handle space(H5Dget_space(dataset), H5Sclose);
  if (dataset < 0 || H5Tget_class(type) != H5T_INTEGER || H5Sget_simple_extent_ndims(space) != 1)
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "{}: \"documents\" is not one row of integers", path);
  starts.resize(static_cast<size_t>(H5Sget_simple_extent_npoints(space)));
  if (H5Dread(dataset, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, starts.data()) < 0)
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "cannot read {}: {}", path, Reason());
  if (starts.empty() || starts[0] != 0 || starts.back() >= tokens ||
      std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<>()) != starts.end())
    SHOAL_FAIL(ErrorKind::kData, "hdf5",
               "{}: \"documents\" must begin with 0 and ascend below the {} tokens", path, tokens);
  return starts;
}

std::optional<int32_t> ReadEndOfDocument(hid_t dataset) {
  int32_t id = 0;
  if (H5Aexists(dataset, "end_of_document") <= 0) return {};
  const Handle attribute(H5Aopen(dataset, "end_of_document", H5P_DEFAULT), H5Aclose);
  const Handle space(H5Aget_space(attribute), H5Sclose);
  if (H5Sget_simple_extent_npoints(space) != 1 || H5Aread(attribute, H5T_NATIVE_INT32, &id) < 0)
    return {};
  return id;
}

}  // namespace

std::shared_ptr<const TokenSource> OpenHdf5(const CorpusOptions& options) {
  const std::string& path = options.path;
  const FileBytes bytes(path);
  const Quiet quiet;
  const Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose);
  if (file < 0)
    SHOAL_FAIL(ErrorKind::kData, "hdf5",
               "cannot open {} as HDF5: {}. It is cut short, damaged or of another kind", path,
               Reason());
  const std::string name = ChooseDataset(file, path);
  const std::string where = fmt::format("{}, dataset \"{}\"", path, name);
  const Handle dataset(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
  const Handle stored(H5Dget_type(dataset), H5Tclose);
  const Handle space(H5Dget_space(dataset), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space);
  if (dataset < 0 || stored < 0 || rank < 1)
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "cannot read {}: {}", where, Reason());
  std::vector<hsize_t> dims(rank);
  H5Sget_simple_extent_dims(space, dims.data(), nullptr);
  const IntType type = TypeOf(stored, where);
  int64_t count = 1, row = 1, ignored = 0;
  for (int i = 0; i < rank; ++i) {
    const bool overflow = __builtin_mul_overflow(count, dims[i], &count) ||
                          __builtin_mul_overflow(count, SizeOf(type), &ignored);
    if (overflow) SHOAL_FAIL(ErrorKind::kData, "hdf5", "{} is too large to be true", where);
    if (i > 0) row *= static_cast<int64_t>(dims[i]);
  }
  if (count == 0)
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "{} is empty: there are no ids to learn from", where);

  SourceInfo info{.path = path, .format = "hdf5", .dtype = Name(type)};
  info.stored_bytes = bytes.size();
  info.end_of_document = ReadEndOfDocument(dataset);
  if (!info.end_of_document) info.end_of_document = options.end_of_document;
  NextDocumentFunction next;
  if (rank > 1) {
    info.documents = static_cast<int64_t>(dims[0]);
    next = [row, count](int64_t position) {
      const int64_t start = (position / row + 1) * row;
      return start < count ? start : std::numeric_limits<int64_t>::max();
    };
  } else if (std::vector<int64_t> starts = ReadStarts(file, count, path); !starts.empty()) {
    info.documents = static_cast<int64_t>(starts.size());
    next = [starts = std::move(starts)](int64_t p) { return NextStart(starts, p); };
  }

  const int64_t offset = OffsetInFile(dataset, stored, type);
  if (offset > bytes.size() || (offset >= 0 && count * SizeOf(type) > bytes.size() - offset))
    SHOAL_FAIL(ErrorKind::kData, "hdf5", "{} is cut short: its ids end at byte {}, the file at {}",
               where, offset + count * SizeOf(type), bytes.size());
  const TokenArray array = offset >= 0
                               ? TokenArray{type, bytes.data() + offset, count, bytes.owner()}
                               : Decode(dataset, type, count, where);
  return std::make_shared<ArraySource>(std::move(info), array, options.vocab, std::move(next));
}

void WriteHdf5(const TokenArray& tokens, std::span<const int64_t> starts, int32_t end_of_document,
               AtomicFile& target) {
  const Quiet quiet;
  const auto fail = [&] {
    SHOAL_FAIL(ErrorKind::kStorage, "hdf5", "cannot write {}: {}", target.path(), Reason());
  };
  {
    Handle file(H5Fcreate(target.temporary_path().c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT),
                H5Fclose);
    if (file < 0) fail();
    const auto write = [&](const char* name, hid_t type, hsize_t count, const void* data) {
      const Handle space(H5Screate_simple(1, &count, nullptr), H5Sclose);
      const Handle plist(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
      H5Pset_layout(plist, H5D_CONTIGUOUS);
      Handle dataset(H5Dcreate2(file, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT),
                     H5Dclose);
      if (dataset < 0 || H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0) fail();
      if (!dataset.Close()) fail();
    };
    write("tokens", NativeType(tokens.type), static_cast<hsize_t>(tokens.size), tokens.data);
    write("documents", H5T_NATIVE_INT64, starts.size(), starts.data());
    const Handle dataset(H5Dopen2(file, "tokens", H5P_DEFAULT), H5Dclose);
    const Handle scalar(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle attribute(
        H5Acreate2(dataset, "end_of_document", H5T_NATIVE_INT32, scalar, H5P_DEFAULT, H5P_DEFAULT),
        H5Aclose);
    if (attribute < 0 || H5Awrite(attribute, H5T_NATIVE_INT32, &end_of_document) < 0) fail();
    if (H5Fflush(file, H5F_SCOPE_GLOBAL) < 0) fail();
  }
}

#else

namespace {
[[noreturn]] void FailWithoutHdf5(const std::string& path) {
  SHOAL_FAIL(ErrorKind::kData, "hdf5",
             "{} is HDF5, which this build of Shoal leaves out. Use .bin/.idx, or configure with "
             "-DSHOAL_HDF5=ON (launch/setup.sh installs the library)",
             path);
}
}  // namespace

std::shared_ptr<const TokenSource> OpenHdf5(const CorpusOptions& options) {
  FailWithoutHdf5(options.path);
}
void WriteHdf5(const TokenArray&, std::span<const int64_t>, int32_t, AtomicFile& target) {
  FailWithoutHdf5(target.path());
}

#endif

}  // namespace shoal
