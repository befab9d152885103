// cuBLASLt: a plan per shape and layout, kept for the life of the process.
#include <cublasLt.h>

#include <array>
#include <map>
#include <mutex>
#include <numeric>

#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/handles.h"

#define SHOAL_CUBLAS_CHECK(call, op)                                          \
  do {                                                                        \
    const cublasStatus_t shoal_status = (call);                               \
    SHOAL_CHECK(shoal_status == CUBLAS_STATUS_SUCCESS, (op), "{}: {}", #call, \
                cublasLtGetStatusString(shoal_status));                       \
  } while (false)

namespace shoal::kernels::cuda {
namespace {

constexpr size_t kMostWorkspace = 32 << 20;
constexpr size_t kWorkspaceAlignment = 256;

struct Plan {
  bool found = false;
  cublasLtMatrixLayoutOpaque_t left, right, d;
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace = 0;
};

using PlanKey = std::array<int64_t, 16>;

cudaDataType_t CudaType(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return CUDA_R_64F;
    case DType::kF32:
      return CUDA_R_32F;
    default:
      return CUDA_R_16BF;
  }
}

// What cuBLASLt has kernels for: products in f64, f32 (not TF32) and bf16 with f32 sums.
bool Supported(const Gemm& gemm) {
  if (gemm.in == DType::kBF16) return gemm.out == DType::kBF16 || gemm.out == DType::kF32;
  return gemm.in == gemm.out && !(gemm.in == DType::kF64 && gemm.bias);
}

PlanKey KeyOf(const Gemm& g) {
  return {g.m,
          g.n,
          g.k,
          g.batch,
          static_cast<int64_t>(g.in),
          static_cast<int64_t>(g.out),
          g.left.transposed,
          g.left.leading,
          g.left.batch_stride,
          g.right.transposed,
          g.right.leading,
          g.right.batch_stride,
          g.d.leading,
          g.d.batch_stride,
          g.bias != nullptr,
          g.beta != 0};
}

// On the stack: made for every call, because it holds the bias's address.
class Operation {
 public:
  Operation(const char* op, const Gemm& gemm) : op_(op) {
    const bool f64 = gemm.in == DType::kF64;
    SHOAL_CUBLAS_CHECK(
        cublasLtMatmulDescInit(&descriptor_, f64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                               f64 ? CUDA_R_64F : CUDA_R_32F),
        op_);
    const auto transposition = [](bool transposed) {
      return transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    };
    Set(CUBLASLT_MATMUL_DESC_TRANSA, transposition(gemm.left.transposed));
    Set(CUBLASLT_MATMUL_DESC_TRANSB, transposition(gemm.right.transposed));
    if (gemm.bias) {
      Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, gemm.bias);
      Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CudaType(gemm.out));
    }
  }
  cublasLtMatmulDesc_t get() { return &descriptor_; }

 private:
  template <class T>
  void Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    SHOAL_CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&descriptor_, attribute, &value, sizeof value), op_);
  }

  const char* op_;
  cublasLtMatmulDescOpaque_t descriptor_;
};

void InitLayout(const char* op, cublasLtMatrixLayoutOpaque_t* layout, DType dtype,
                const GemmOperand& operand, int64_t rows, int64_t columns, int64_t batch) {
  if (operand.transposed) std::swap(rows, columns);
  SHOAL_CUBLAS_CHECK(
      cublasLtMatrixLayoutInit(layout, CudaType(dtype), rows, columns, operand.leading), op);
  if (batch == 1) return;
  const int32_t count = static_cast<int32_t>(batch);
  SHOAL_CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                      &count, sizeof count),
                     op);
  SHOAL_CUBLAS_CHECK(
      cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                       &operand.batch_stride, sizeof operand.batch_stride),
      op);
}

Plan MakePlan(cublasLtHandle_t handle, const char* op, const Gemm& gemm) {
  Plan plan;
  Operation operation(op, gemm);
  InitLayout(op, &plan.left, gemm.in, gemm.left, gemm.m, gemm.k, gemm.batch);
  InitLayout(op, &plan.right, gemm.in, gemm.right, gemm.k, gemm.n, gemm.batch);
  InitLayout(op, &plan.d, gemm.out, gemm.d, gemm.m, gemm.n, gemm.batch);

  cublasLtMatmulPreferenceOpaque_t preference;
  SHOAL_CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference), op);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    SHOAL_CUBLAS_CHECK(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value), op);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kMostWorkspace});
  const auto alignment = [&](const GemmOperand& operand, DType dtype) {
    const int64_t bytes = gemm.batch > 1 ? operand.batch_stride * int64_t(SizeOf(dtype)) : 0;
    return static_cast<uint32_t>(std::gcd(bytes, int64_t{kGemmAlignment}));
  };
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(gemm.left, gemm.in));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(gemm.right, gemm.in));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(gemm.d, gemm.out));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(gemm.d, gemm.out));
  // A split of K may only add up in f32 and in a fixed order: not in place (atomics), not in bf16.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));

  cublasLtMatmulHeuristicResult_t result = {};
  int results = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle, operation.get(), &plan.left, &plan.right, &plan.d,
                                     &plan.d, &preference, 1, &result, &results);
  if (status == CUBLAS_STATUS_SUCCESS && results > 0 && result.state == CUBLAS_STATUS_SUCCESS) {
    plan.found = true;
    plan.algorithm = result.algo;
    plan.workspace = result.workspaceSize;
  }
  return plan;
}

Plan PlanOf(int device, cublasLtHandle_t handle, const char* op, const Gemm& gemm) {
  static std::mutex mutex;
  // Plain memory, but left to the process's end like the handles it goes with.
  static auto* plans = new std::map<std::pair<int, PlanKey>, Plan>;
  std::lock_guard lock(mutex);
  const auto key = std::pair(device, KeyOf(gemm));
  const auto found = plans->find(key);
  if (found != plans->end()) return found->second;
  return plans->emplace(key, MakePlan(handle, op, gemm)).first->second;
}

}  // namespace

bool RunCublasLt(const Stream& stream, const char* op, const Gemm& gemm) {
  if (!Supported(gemm) || gemm.batch > 0x7fffffff) return false;
  const int device = stream.device.index;
  SHOAL_CUDA_CHECK(cudaSetDevice(device), op);
  const cublasLtHandle_t handle = StateOf(device).cublaslt();
  Plan plan = PlanOf(device, handle, op, gemm);
  if (!plan.found) return false;
  Operation operation(op, gemm);
  Scratch scratch(stream, plan.workspace ? plan.workspace + kWorkspaceAlignment : 0);
  const uintptr_t address = reinterpret_cast<uintptr_t>(scratch.as<char>());
  void* workspace =
      reinterpret_cast<void*>(CeilDiv(address, kWorkspaceAlignment) * kWorkspaceAlignment);
  const float one32 = 1, beta32 = static_cast<float>(gemm.beta);
  const double one64 = 1;
  const bool f64 = gemm.in == DType::kF64;
  const void* one = f64 ? static_cast<const void*>(&one64) : &one32;
  const void* beta = f64 ? static_cast<const void*>(&gemm.beta) : &beta32;
  SHOAL_CUBLAS_CHECK(
      cublasLtMatmul(handle, operation.get(), one, gemm.left.data, &plan.left, gemm.right.data,
                     &plan.right, beta, gemm.d.data, &plan.d, gemm.d.data, &plan.d, &plan.algorithm,
                     workspace, plan.workspace, Handle(stream)),
      op);
  return true;
}

}  // namespace shoal::kernels::cuda
