#include <nccl.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

struct Message {
  const void* data;
  size_t bytes;
  bool taken = false;
};

struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::pair<int, int>, std::deque<Message*>> mail;  // from, to
  int joined = 0;
  bool aborted = false;

  template <class F>
  ncclResult_t Await(std::unique_lock<std::mutex>& lock, F&& ready) {
    // Far longer than anything takes: ranks wait for each other in a circle.
    const bool in_time =
        changed.wait_for(lock, std::chrono::seconds(60), [&] { return aborted || ready(); });
    if (!in_time) aborted = true;
    return aborted ? ncclRemoteError : ncclSuccess;
  }
};

std::mutex groups_mutex;
std::map<int, std::shared_ptr<Group>> groups;  // by what ncclGetUniqueId drew
int drawn = 0;

}  // namespace

struct EmulatedComm {
  std::shared_ptr<Group> group;
  int rank, size;
};

namespace {

struct Call {
  ncclComm_t comm;
  int peer;
  const void* send;  // or
  void* receive;
  size_t bytes;
};
thread_local std::vector<Call> calls;
thread_local int depth = 0;

ncclResult_t Run(const std::vector<Call>& together) {
  std::deque<Message> sent;
  std::vector<std::pair<Group*, Message*>> on_their_way;
  for (const Call& call : together) {
    if (call.send == nullptr) continue;
    Group& group = *call.comm->group;
    sent.push_back({call.send, call.bytes});
    const std::lock_guard lock(group.mutex);
    group.mail[{call.comm->rank, call.peer}].push_back(&sent.back());
    on_their_way.emplace_back(&group, &sent.back());
    group.changed.notify_all();
  }
  ncclResult_t result = ncclSuccess;
  for (const Call& call : together) {
    if (call.receive == nullptr) continue;
    Group& group = *call.comm->group;
    std::unique_lock lock(group.mutex);
    std::deque<Message*>& mail = group.mail[{call.peer, call.comm->rank}];
    const ncclResult_t waited = group.Await(lock, [&] { return !mail.empty(); });
    if (waited != ncclSuccess) {
      result = waited;
      break;
    }
    Message* message = mail.front();
    mail.pop_front();
    if (message->bytes != call.bytes) {
      result = ncclInvalidArgument;
      group.aborted = true;
    } else {
      const cuda_emulation::DeviceAccess access;
      memcpy(call.receive, message->data, call.bytes);
    }
    message->taken = true;
    group.changed.notify_all();
  }
  // The buffers are the caller's again: also after a failure nobody may look at them.
  for (const auto& [group, message] : on_their_way) {
    std::unique_lock lock(group->mutex);
    const ncclResult_t waited = group->Await(lock, [&] { return message->taken; });
    if (waited != ncclSuccess) {
      result = waited;
      group->mail.clear();
    }
  }
  return result;
}

ncclResult_t Enqueue(const Call& call) {
  calls.push_back(call);
  return depth > 0 ? ncclSuccess : Run(std::exchange(calls, {}));
}

}  // namespace

const char* ncclGetErrorString(ncclResult_t code) {
  return code == ncclRemoteError ? "another rank has failed, or nobody comes (emulated)"
                                 : "sizes differ (emulated)";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock(groups_mutex);
  *id = {};
  memcpy(id->internal, &++drawn, sizeof drawn);
  groups[drawn] = std::make_shared<Group>();
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  int number = 0;
  memcpy(&number, id.internal, sizeof number);
  std::shared_ptr<Group> group;
  {
    const std::lock_guard lock(groups_mutex);
    const auto it = groups.find(number);
    if (it == groups.end() || rank < 0 || rank >= size) return ncclInvalidArgument;
    group = it->second;
  }
  std::unique_lock lock(group->mutex);
  ++group->joined;
  group->changed.notify_all();
  const ncclResult_t waited = group->Await(lock, [&] { return group->joined == size; });
  if (waited == ncclSuccess) *comm = new EmulatedComm{group, rank, size};
  return waited;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  {
    const std::lock_guard lock(comm->group->mutex);
    comm->group->aborted = true;
    comm->group->changed.notify_all();
  }
  return ncclCommDestroy(comm);
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() { return --depth > 0 ? ncclSuccess : Run(std::exchange(calls, {})); }

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int to, ncclComm_t comm,
                      cudaStream_t) {
  return Enqueue({comm, to, data, nullptr, count});
}

ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int from, ncclComm_t comm,
                      cudaStream_t) {
  return Enqueue({comm, from, nullptr, data, count});
}

ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t, int root,
                           ncclComm_t comm, cudaStream_t) {
  ++depth;
  if (comm->rank == root) {
    for (int r = 0; r < comm->size; ++r) Enqueue({comm, r, send, nullptr, count});
  }
  Enqueue({comm, root, nullptr, receive, count});
  return ncclGroupEnd();
}

ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t,
                           ncclComm_t comm, cudaStream_t) {
  ++depth;
  for (int r = 0; r < comm->size; ++r) {
    Enqueue({comm, r, send, nullptr, count});
    Enqueue(
        {comm, r, nullptr, static_cast<char*>(receive) + static_cast<size_t>(r) * count, count});
  }
  return ncclGroupEnd();
}
