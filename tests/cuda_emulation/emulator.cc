#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "core/base/error.h"
#include "core/base/philox.h"
#include "cuda_runtime.h"

// Saves the registers that a call preserves on the running stack, and goes on with another one.
extern "C" void ShoalSwitchStack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl ShoalSwitchStack
.type ShoalSwitchStack, @function
ShoalSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ShoalSwitchStack, .-ShoalSwitchStack
)");
constexpr int kSavedRegisters = 6;
#else
#error "the emulation's stack switch is written for x86-64"
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr int kMostThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMostShared = 256 << 10, kGuard = 256;

struct Copy {
  void* to;
  char data[16];
  int group;
};

struct Fibre {
  std::vector<Copy> copies;  // on their way
  int copy_groups = 0;       // closed so far
  int thread = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false;
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Machine {
  std::vector<Fibre> fibres;
  int threads = 0, live = 0;
  Fibre* current = nullptr;
  void* scheduler = nullptr;
  const std::function<void()>* body = nullptr;
  Barrier block_barrier;
  Barrier warp_barriers[kMostThreads / kWarp];
  Lanes lanes[kMostThreads / kWarp];
  alignas(1024) unsigned char shared[kMostShared + kGuard];
  int64_t progress = 0;  // barriers opened and threads ended
  uint64_t draws = 0;

  Machine() : fibres(kMostThreads) {
    char* stacks =
        static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    SHOAL_CHECK(stacks != MAP_FAILED, "emulation", "no memory for stacks");
    for (int i = 0; i < kMostThreads; ++i) {
      fibres[i].thread = i;
      fibres[i].stack = stacks + i * kStackBytes;
    }
  }
};

Machine& TheMachine() {
  static auto* machine = new Machine;
  return *machine;
}

void Yield() {
  Machine& m = TheMachine();
  ShoalSwitchStack(&m.current->stack_pointer, m.scheduler);
}

void OpenBlockBarrierIfFull(Machine& m) {
  if (m.block_barrier.arrived < m.live || m.live == 0) return;
  m.block_barrier.arrived = 0;
  ++m.block_barrier.generation;
  ++m.progress;
}

void FibreMain() {
  Machine& m = TheMachine();
  (*m.body)();
  m.current->done = true;
  --m.live;
  ++m.progress;
  OpenBlockBarrierIfFull(m);  // threads that ended count as arrived
  Yield();
}

void Start(Fibre& fibre) {
  void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes - 64);
  *--top = nullptr;  // a call would have left the stack 8 bytes off a boundary of 16
  *--top = reinterpret_cast<void*>(&FibreMain);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
  fibre.done = false;
}

// One range for all of the device's memory.
struct DeviceMemory {
  static constexpr size_t kBytes = size_t{1} << 44, kPage = 4096;

  DeviceMemory() {
    void* range =
        mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    SHOAL_CHECK(range != MAP_FAILED, "emulation", "no address space for device memory");
    begin = static_cast<char*>(range);
  }
  void Protect(int access) const { mprotect(begin, used, access); }

  std::recursive_mutex mutex;
  std::map<size_t, std::vector<char*>> free;  // by size
  char* begin = nullptr;
  size_t used = 0;
  int scopes = 0;
};

DeviceMemory& TheMemory() {
  static auto* memory = new DeviceMemory;
  return *memory;
}

uint32_t Draw(Machine& m) { return shoal::PhiloxWord({1, 2}, m.draws++); }

void RunBlock(Machine& m, size_t shared) {
  m.live = m.threads;
  m.block_barrier = {};
  std::fill(std::begin(m.warp_barriers), std::end(m.warp_barriers), Barrier{});
  memset(m.shared, 0xff, shared + kGuard);
  std::vector<int> order(m.threads);
  for (int i = 0; i < m.threads; ++i) {
    order[i] = i;
    Start(m.fibres[i]);
  }
  while (m.live > 0) {
    const int64_t before = m.progress;
    // Rotating and reversing is as good as a shuffle at exposing a missing barrier, and cheap.
    std::rotate(order.begin(), order.begin() + Draw(m) % m.threads, order.end());
    if (Draw(m) % 2) std::reverse(order.begin(), order.end());
    for (int i : order) {
      if (m.fibres[i].done) continue;
      m.current = &m.fibres[i];
      threadIdx.x = i;
      ShoalSwitchStack(&m.scheduler, m.current->stack_pointer);
    }
    SHOAL_CHECK(m.progress != before, "emulation",
                "all threads wait: a barrier is not reached by all of a block or warp");
  }
  int not_waited = 0;
  for (Fibre& fibre : m.fibres) {
    not_waited += !fibre.copies.empty();
    fibre.copies.clear();
  }
  SHOAL_CHECK(not_waited == 0, "emulation", "{} threads end with copies on their way", not_waited);
  for (size_t i = 0; i < kGuard; ++i)
    SHOAL_CHECK(m.shared[shared + i] == 0xff, "emulation",
                "writes {} bytes behind its {} bytes of shared memory", i, shared);
}

}  // namespace

// The size stands before the block.
void* AllocateDevice(size_t bytes) {
  DeviceMemory& m = TheMemory();
  const DeviceAccess access;
  const size_t size =
      (bytes + 2 * DeviceMemory::kPage - 1) / DeviceMemory::kPage * DeviceMemory::kPage;
  char* block = nullptr;
  if (std::vector<char*>& free = m.free[size]; !free.empty()) {
    block = free.back();
    free.pop_back();
  } else {
    if (size > DeviceMemory::kBytes - m.used) return nullptr;
    block = m.begin + m.used;
    m.used += size;
    m.Protect(PROT_READ | PROT_WRITE);
  }
  memcpy(block, &size, sizeof size);
  return block + DeviceMemory::kPage;
}

void FreeDevice(void* data) {
  if (data == nullptr) return;
  const DeviceAccess access;
  char* block = static_cast<char*>(data) - DeviceMemory::kPage;
  size_t size = 0;
  memcpy(&size, block, sizeof size);
  if (size > size_t{1} << 20)
    madvise(block + DeviceMemory::kPage, size - DeviceMemory::kPage, MADV_DONTNEED);
  TheMemory().free[size].push_back(block);
}

bool OnDevice(const void* data) {
  DeviceMemory& m = TheMemory();
  const std::lock_guard lock(m.mutex);
  return data >= m.begin && data < m.begin + m.used;
}

DeviceAccess::DeviceAccess() {
  DeviceMemory& m = TheMemory();
  m.mutex.lock();
  if (++m.scopes == 1) m.Protect(PROT_READ | PROT_WRITE);
}

DeviceAccess::~DeviceAccess() {
  DeviceMemory& m = TheMemory();
  if (--m.scopes == 0) m.Protect(PROT_NONE);
  m.mutex.unlock();
}

unsigned char* DynamicSharedMemory() { return TheMachine().shared; }

void BlockBarrier() {
  Machine& m = TheMachine();
  const int64_t generation = m.block_barrier.generation;
  ++m.block_barrier.arrived;
  OpenBlockBarrierIfFull(m);
  while (m.block_barrier.generation == generation) Yield();
}

void WarpBarrier() {
  Machine& m = TheMachine();
  Barrier& barrier = m.warp_barriers[m.current->thread / kWarp];
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == kWarp) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++m.progress;
  }
  while (barrier.generation == generation) Yield();
}

void WarpTogether(void* mine, void (*f)(Lanes& all)) {
  Machine& m = TheMachine();
  const int thread = m.current->thread, warp = thread / kWarp;
  m.lanes[warp][thread % kWarp] = mine;
  if (m.warp_barriers[warp].arrived == kWarp - 1) f(m.lanes[warp]);
  WarpBarrier();
}

void StartCopy(void* to, const void* from) {
  Machine& m = TheMachine();
  Fibre& fibre = *m.current;
  SHOAL_CHECK(
      reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
      "emulation", "a misaligned copy");
  Copy copy{to, {}, fibre.copy_groups};
  if (from) memcpy(copy.data, from, sizeof copy.data);
  if (Draw(m) % 2)
    memcpy(to, copy.data, sizeof copy.data);
  else
    fibre.copies.push_back(copy);
}

void CloseCopyGroup() { ++TheMachine().current->copy_groups; }

void WaitForCopyGroups(int pending) {
  Fibre& fibre = *TheMachine().current;
  std::erase_if(fibre.copies, [&](const Copy& copy) {
    if (copy.group >= fibre.copy_groups - pending) return false;
    memcpy(copy.to, copy.data, sizeof copy.data);
    return true;
  });
}

void Run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) {
  const DeviceAccess access;
  Machine& m = TheMachine();
  SHOAL_CHECK(block.x % kWarp == 0 && block.y == 1 && block.z == 1, "emulation",
              "a block of {} x {} x {} threads", block.x, block.y, block.z);
  SHOAL_CHECK(shared <= kMostShared, "emulation", "{} bytes of shared memory", shared);
  m.threads = static_cast<int>(block.x);
  m.body = &thread;
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        RunBlock(m, shared);
      }
    }
  }
}

}  // namespace cuda_emulation
