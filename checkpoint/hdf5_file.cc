#include "checkpoint/hdf5_file.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/base/build_config.h"
#include "core/base/error.h"

#ifdef SHOAL_WITH_HDF5
#include <hdf5.h>

namespace shoal {
namespace {

// Closes an HDF5 identifier at the end of the scope.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }  // NOLINT

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

// Before the first call. HDF5 prints its own stack of errors unless told not to. At the end of the
// process it would try once more to finish a file that a full disk did not let it finish, and
// crash; all files are closed by then, so it has nothing to do there.
void Prepare() {
  H5dont_atexit();
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

hid_t FileType(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return H5T_IEEE_F64LE;
    case DType::kF32:
      return H5T_IEEE_F32LE;
    case DType::kBF16:
    case DType::kF16:
      return H5T_STD_U16LE;
    case DType::kI32:
      return H5T_STD_I32LE;
    case DType::kI64:
      return H5T_STD_I64LE;
    case DType::kI8:
      return H5T_STD_I8LE;
    case DType::kU8:
      break;
  }
  return H5T_STD_U8LE;
}

[[noreturn]] void Fail(const std::string& path, const std::string& what, const std::string& name) {
  const std::string reason =
      errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? " (no space left)" : "";
  SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: cannot {}{}{}{}", path, what,
             name.empty() ? "" : " ", name, reason);
}

}  // namespace

Hdf5File Hdf5File::Create(const std::string& path) {
  Prepare();
  errno = 0;
  const hid_t id = H5Fcreate(path.c_str(), H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT);
  if (id < 0) Fail(path, "create the file", "");
  return {path, id};
}

Hdf5File Hdf5File::Open(const std::string& path) {
  Prepare();
  errno = 0;
  const hid_t id = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (id < 0) Fail(path, "open it as HDF5: missing, truncated or not a checkpoint", "");
  return {path, id};
}

Hdf5File::Hdf5File(Hdf5File&& other) noexcept
    : path_(std::move(other.path_)), id_(std::exchange(other.id_, -1)) {}

Hdf5File::~Hdf5File() {
  if (id_ >= 0) H5Fclose(id_);
}

void Hdf5File::Close() {
  errno = 0;
  if (H5Fclose(std::exchange(id_, -1)) < 0) Fail(path_, "finish the file", "");
}

void Hdf5File::Write(const std::string& name, DType dtype, const Dims& shape, const void* data) {
  errno = 0;
  hsize_t extent[Dims::kMaxRank];
  for (int i = 0; i < shape.rank(); ++i) extent[i] = static_cast<hsize_t>(shape[i]);
  const Handle space(H5Screate_simple(shape.rank(), extent, nullptr), H5Sclose);
  const Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links, 1);
  const Handle set(
      H5Dcreate2(id_, name.c_str(), FileType(dtype), space, links, H5P_DEFAULT, H5P_DEFAULT),
      H5Dclose);
  if (set < 0) Fail(path_, "create array", name);
  if (shape.numel() > 0 &&
      H5Dwrite(set, FileType(dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0) {
    Fail(path_, "write array", name);
  }
  const Handle text(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(text, std::strlen(shoal::Name(dtype)) + 1);
  const Handle scalar(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle attribute(H5Acreate2(set, "dtype", text, scalar, H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
  if (attribute < 0 || H5Awrite(attribute, text, shoal::Name(dtype)) < 0)
    Fail(path_, "describe array", name);
}

void Hdf5File::Read(const std::string& name, DType dtype, const Dims& shape, void* data) const {
  errno = 0;
  const Handle set(H5Dopen2(id_, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (set < 0) Fail(path_, "find array", name);
  const Handle space(H5Dget_space(set), H5Sclose);
  hsize_t extent[H5S_MAX_RANK] = {};
  const int rank = H5Sget_simple_extent_dims(space, extent, nullptr);
  bool same = rank == shape.rank();
  for (int i = 0; same && i < rank; ++i) same = extent[i] == static_cast<hsize_t>(shape[i]);
  if (!same)
    SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: array {} is not of shape {}", path_, name,
               shape.ToString());
  if (shape.numel() > 0 && H5Dread(set, FileType(dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0) {
    Fail(path_, "read array", name);
  }
}

}  // namespace shoal

#else

namespace shoal {
namespace {
[[noreturn]] void Missing() {
  SHOAL_FAIL(ErrorKind::kStorage, "checkpoint",
             "this build has no HDF5; install libhdf5-dev and build again");
}
}  // namespace
Hdf5File Hdf5File::Create(const std::string&) { Missing(); }
Hdf5File Hdf5File::Open(const std::string&) { Missing(); }
Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;
Hdf5File::~Hdf5File() = default;
void Hdf5File::Write(const std::string&, DType, const Dims&, const void*) { Missing(); }
void Hdf5File::Read(const std::string&, DType, const Dims&, void*) const { Missing(); }
void Hdf5File::Close() {}
}  // namespace shoal
#endif
