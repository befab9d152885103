// The handle that kernels/cuda/handles.cu keeps; products are emulated in emulated_gemm.cc.
#pragma once

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS };
inline cublasStatus_t cublasLtCreate(struct cublasLtContext**) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(struct cublasLtContext*) { return CUBLAS_STATUS_SUCCESS; }
inline const char* cublasLtGetStatusString(cublasStatus_t) { return "emulated"; }
