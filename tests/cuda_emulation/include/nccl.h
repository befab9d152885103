// Enough of NCCL for ranks that are threads of one process and compute on the emulated device. A
// call has ended when it returns; calls of a group go out together at its end.
#pragma once
#pragma GCC system_header  // its names are not ours to choose

#include <cuda_runtime.h>

#include <cstddef>

enum ncclResult_t { ncclSuccess, ncclRemoteError, ncclInvalidArgument };
enum ncclDataType_t { ncclUint8 };
struct ncclUniqueId {
  char internal[128];
};
using ncclComm_t = struct EmulatedComm*;

const char* ncclGetErrorString(ncclResult_t code);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int to, ncclComm_t comm,
                      cudaStream_t);
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int from, ncclComm_t comm,
                      cudaStream_t);
ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t, int root,
                           ncclComm_t comm, cudaStream_t);
ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t,
                           ncclComm_t comm, cudaStream_t);
