#include "checkpoint/hdf5_file.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <unordered_map>

#include "checkpoint/file_io.h"
#include "core/base/build_config.h"
#include "core/base/error.h"

namespace shoal {

std::vector<Extent> Gaps(std::vector<Extent> arrays, int64_t size) {
  std::sort(arrays.begin(), arrays.end(),
            [](const Extent& a, const Extent& b) { return a.at < b.at; });
  std::vector<Extent> gaps;
  int64_t at = 0;
  for (const Extent& array : arrays) {
    if (array.bytes == 0) continue;
    if (array.at > at) gaps.push_back({at, array.at - at});
    at = array.at + array.bytes;
  }
  if (size > at) gaps.push_back({at, size - at});
  return gaps;
}

}  // namespace shoal

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
// process it has nothing to do: all files are closed by then.
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
    case DType::kI16:
      return H5T_STD_I16LE;
    case DType::kU8:
      break;
  }
  return H5T_STD_U8LE;
}

[[noreturn]] void Fail(const std::string& path, const std::string& what, const std::string& name) {
  FailFile(path, fmt::format("cannot {}{}{}", what, name.empty() ? "" : " ", name));
}

// What HDF5 writes of a file that is nowhere else: pages that it never writes, as those of the
// arrays, take no memory.
class Pages {
 public:
  void Read(uint64_t at, size_t bytes, char* data) const {
    ForEach(at, bytes, [&](uint64_t page, size_t from, size_t count, size_t done) {
      const auto found = pages_.find(page);
      if (found == pages_.end()) {
        std::memset(data + done, 0, count);
      } else {
        std::memcpy(data + done, found->second.data() + from, count);
      }
    });
  }
  void Write(uint64_t at, size_t bytes, const char* data) {
    ForEach(at, bytes, [&](uint64_t page, size_t from, size_t count, size_t done) {
      std::string& text = pages_[page];
      text.resize(kPageBytes);
      std::memcpy(text.data() + from, data + done, count);
    });
  }

 private:
  static constexpr size_t kPageBytes = 4096;

  template <class F>
  static void ForEach(uint64_t at, size_t bytes, const F& f) {
    for (size_t done = 0; done < bytes;) {
      const size_t from = (at + done) % kPageBytes,
                   count = std::min(bytes - done, kPageBytes - from);
      f((at + done) / kPageBytes, from, count, done);
      done += count;
    }
  }

  std::unordered_map<uint64_t, std::string> pages_;
};

// HDF5's own kind of a file, which reads and writes Pages.
struct PagesFile {
  H5FD_t base;  // the library's part, which comes first
  Pages* pages;
  haddr_t end;
  static PagesFile& Of(H5FD_t* file) { return *reinterpret_cast<PagesFile*>(file); }
  static const PagesFile& Of(const H5FD_t* file) {
    return *reinterpret_cast<const PagesFile*>(file);
  }
};

H5FD_class_t PagesDriver() {
  H5FD_class_t d = {};
  d.name = "shoal-pages";
  d.maxaddr = (haddr_t{1} << 62) - 1;
  d.fc_degree = H5F_CLOSE_STRONG;
  d.fapl_size = sizeof(void*);  // a Pages*
  d.open = [](const char*, unsigned, hid_t access, haddr_t) {
    auto* file = new PagesFile{};
    file->pages = *static_cast<Pages* const*>(H5Pget_driver_info(access));
    return &file->base;
  };
  d.close = [](H5FD_t* file) -> herr_t {
    delete &PagesFile::Of(file);
    return 0;
  };
  d.get_eoa = [](const H5FD_t* file, H5FD_mem_t) { return PagesFile::Of(file).end; };
  d.set_eoa = [](H5FD_t* file, H5FD_mem_t, haddr_t end) -> herr_t {
    PagesFile::Of(file).end = end;
    return 0;
  };
  d.get_eof = [](const H5FD_t* file, H5FD_mem_t) { return PagesFile::Of(file).end; };
  d.read = [](H5FD_t* file, H5FD_mem_t, hid_t, haddr_t at, size_t bytes, void* data) -> herr_t {
    PagesFile::Of(file).pages->Read(at, bytes, static_cast<char*>(data));
    return 0;
  };
  d.write = [](H5FD_t* file, H5FD_mem_t, hid_t, haddr_t at, size_t bytes,
               const void* data) -> herr_t {
    PagesFile::Of(file).pages->Write(at, bytes, static_cast<const char*>(data));
    return 0;
  };
  const H5FD_mem_t all_alike[] = H5FD_FLMAP_SINGLE;
  std::copy(std::begin(all_alike), std::end(all_alike), d.fl_map);
  return d;
}

// Arrays of at least kLarge bytes begin at pages of the disk.
constexpr hsize_t kLarge = 1 << 16, kPage = 4096;

void Describe(const Handle& set, const Hdf5Array& array, const std::string& path) {
  const Handle text(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(text, std::strlen(shoal::Name(array.dtype)) + 1);
  const Handle scalar(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle attribute(H5Acreate2(set, "dtype", text, scalar, H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
  if (attribute < 0 || H5Awrite(attribute, text, shoal::Name(array.dtype)) < 0)
    Fail(path, "describe array", array.name);
}

// Makes an array that nobody fills; returns where it lies.
int64_t Place(const Handle& file, const Hdf5Array& array, const std::string& path) {
  hsize_t extent[Dims::kMaxRank];
  for (int i = 0; i < array.shape.rank(); ++i) extent[i] = static_cast<hsize_t>(array.shape[i]);
  const Handle space(H5Screate_simple(array.shape.rank(), extent, nullptr), H5Sclose);
  const Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links, 1);
  const Handle how(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_layout(how, H5D_CONTIGUOUS);
  H5Pset_alloc_time(how, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(how, H5D_FILL_TIME_NEVER);
  H5Pset_obj_track_times(how, false);  // the same state is the same bytes
  const Handle set(
      H5Dcreate2(file, array.name.c_str(), FileType(array.dtype), space, links, how, H5P_DEFAULT),
      H5Dclose);
  if (set < 0) Fail(path, "create array", array.name);
  Describe(set, array, path);
  if (array.bytes() == 0) return 0;
  const haddr_t at = H5Dget_offset(set);
  if (at == HADDR_UNDEF) Fail(path, "place array", array.name);
  return static_cast<int64_t>(at);
}

}  // namespace

Hdf5Layout LayOutHdf5(const std::vector<Hdf5Array>& arrays) {
  Prepare();
  static const H5FD_class_t driver_class = PagesDriver();
  static const hid_t driver = H5FDregister(&driver_class);
  const std::string path = "the layout of a save";
  Pages pages;
  Hdf5Layout layout;
  std::vector<Extent> extents;
  {
    const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    Pages* const info = &pages;
    H5Pset_driver(access, driver, &info);
    H5Pset_alignment(access, kLarge, kPage);
    const Handle file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access), H5Fclose);
    if (file < 0) Fail(path, "create the file", "");
    for (const Hdf5Array& array : arrays) {
      layout.offsets.push_back(Place(file, array, path));
      extents.push_back({layout.offsets.back(), array.bytes()});
    }
    hsize_t size = 0;
    if (H5Fflush(file, H5F_SCOPE_LOCAL) < 0 || H5Fget_filesize(file, &size) < 0)
      Fail(path, "finish the file", "");
    layout.size = static_cast<int64_t>(size);
  }
  for (const Extent& gap : Gaps(extents, layout.size)) {
    const size_t end = layout.frame.size(), bytes = static_cast<size_t>(gap.bytes);
    layout.frame.resize(end + bytes);
    pages.Read(static_cast<uint64_t>(gap.at), bytes, layout.frame.data() + end);
  }
  return layout;
}

void ReadHdf5(const std::string& path, const Hdf5Array& array, void* data) {
  Prepare();
  const Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose);
  if (file < 0) Fail(path, "open it as HDF5", "");
  const Handle set(H5Dopen2(file, array.name.c_str(), H5P_DEFAULT), H5Dclose);
  if (set < 0) Fail(path, "find array", array.name);
  const Handle space(H5Dget_space(set), H5Sclose);
  hsize_t extent[H5S_MAX_RANK] = {};
  const int rank = H5Sget_simple_extent_dims(space, extent, nullptr);
  bool same = rank == array.shape.rank();
  for (int i = 0; same && i < rank; ++i) same = extent[i] == static_cast<hsize_t>(array.shape[i]);
  if (!same)
    SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: array {} is not of shape {}", path,
               array.name, array.shape.ToString());
  if (array.bytes() > 0 &&
      H5Dread(set, FileType(array.dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0)
    Fail(path, "read array", array.name);
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
Hdf5Layout LayOutHdf5(const std::vector<Hdf5Array>&) { Missing(); }
void ReadHdf5(const std::string&, const Hdf5Array&, void*) { Missing(); }
}  // namespace shoal
#endif
