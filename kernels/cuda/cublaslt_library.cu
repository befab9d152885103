// cuBLASLt's functions, each found in the library when it is first called. The library is loaded
// then and not at the start: to map its half gigabyte costs a process more than many a short run
// takes, and most of them have no device.
#include <cublasLt.h>
#include <dlfcn.h>

#include "core/base/error.h"

#define SHOAL_STRING(text) #text
#define SHOAL_VERSIONED(major) "libcublasLt.so." SHOAL_STRING(major)

namespace {

void* Find(const char* function) {
  constexpr const char* kLibrary = SHOAL_VERSIONED(CUBLAS_VER_MAJOR);
  static void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  void* found = library ? dlsym(library, function) : nullptr;
  if (found == nullptr) {
    const char* why = dlerror();
    SHOAL_FAIL(shoal::ErrorKind::kConfig, function,
               "matrix products on a GPU need {}, which cannot be loaded: {}. Install it, put its "
               "folder into LD_LIBRARY_PATH, or run with --device cpu",
               kLibrary, why ? why : "it was not found before");
  }
  return found;
}

}  // namespace

// The library's own declaration must fit, or this does not compile.
#define SHOAL_ON_DEMAND(function, parameters, arguments)                                \
  cublasStatus_t function parameters {                                                  \
    static const auto found = reinterpret_cast<decltype(&(function))>(Find(#function)); \
    return found arguments;                                                             \
  }

extern "C" {

SHOAL_ON_DEMAND(cublasLtCreate, (cublasLtHandle_t * handle), (handle))
SHOAL_ON_DEMAND(cublasLtDestroy, (cublasLtHandle_t handle), (handle))
SHOAL_ON_DEMAND(cublasLtMatmul,
                (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha,
                 const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                 cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                 cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                 const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t bytes,
                 cudaStream_t stream),
                (handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
                 algorithm, workspace, bytes, stream))
SHOAL_ON_DEMAND(cublasLtMatmulAlgoGetHeuristic,
                (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                 cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                 cublasLtMatmulPreference_t preference, int wanted,
                 cublasLtMatmulHeuristicResult_t results[], int* count),
                (handle, operation, a, b, c, d, preference, wanted, results, count))
SHOAL_ON_DEMAND(cublasLtMatmulDescInit_internal,
                (cublasLtMatmulDesc_t descriptor, size_t size, cublasComputeType_t compute,
                 cudaDataType_t scale),
                (descriptor, size, compute, scale))
SHOAL_ON_DEMAND(cublasLtMatmulDescSetAttribute,
                (cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute,
                 const void* value, size_t size),
                (descriptor, attribute, value, size))
SHOAL_ON_DEMAND(cublasLtMatmulPreferenceInit_internal,
                (cublasLtMatmulPreference_t preference, size_t size), (preference, size))
SHOAL_ON_DEMAND(cublasLtMatmulPreferenceSetAttribute,
                (cublasLtMatmulPreference_t preference,
                 cublasLtMatmulPreferenceAttributes_t attribute, const void* value, size_t size),
                (preference, attribute, value, size))
SHOAL_ON_DEMAND(cublasLtMatrixLayoutInit_internal,
                (cublasLtMatrixLayout_t layout, size_t size, cudaDataType type, uint64_t rows,
                 uint64_t columns, int64_t leading),
                (layout, size, type, rows, columns, leading))
SHOAL_ON_DEMAND(cublasLtMatrixLayoutSetAttribute,
                (cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
                 const void* value, size_t size),
                (layout, attribute, value, size))

const char* cublasLtGetStatusString(cublasStatus_t status) {
  static const auto found =
      reinterpret_cast<decltype(&cublasLtGetStatusString)>(Find("cublasLtGetStatusString"));
  return found(status);
}

}  // extern "C"
