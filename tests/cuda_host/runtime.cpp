#include <runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#define CUDA_HOST_EXPORT __attribute__((visibility("default")))

// What a thread of the grid reads; to the kernels these are constants.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

enum class State { kReady, kAtBarrier, kAtWarp, kEnded };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes, valid, group;
};

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  // At a warp's operation:
  const char* operation;
  unsigned mask;
  void* operands;
  // Asynchronous copies under way, oldest first, and the number of groups committed:
  std::vector<Copy> copies;
  int groups;
};

enum class Order { kForward, kReverse, kOddFirst, kInterleaved, kRandom };

struct Machine {
  std::mutex running;
  size_t shared_limit = 227 << 10;
  Order order = Order::kForward;
  unsigned seed = 0;

  // The launch under way
  std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
  unsigned char* stacks = nullptr;
  Fiber scheduler;
  Thread* current = nullptr;
  int count = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  void (*body)(const void*);
  const void* argument;
  std::string error;
  std::mt19937 random;
};

Machine m;

int index_of(const Thread& thread) { return static_cast<int>(&thread - m.threads.data()); }

void leave(State state) {
  m.current->state = state;
  m.current->fiber.switch_to(m.scheduler);
}

[[noreturn]] void run_thread() {
  m.body(m.argument);
  for (;;) leave(State::kEnded);
}

// Runs one thread until it has to wait for others.
void enter(Thread& thread) {
  m.current = &thread;
  threadIdx = thread.index;
  m.scheduler.switch_to(thread.fiber);
  m.current = nullptr;
}

std::vector<int> ordered(int count) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (m.order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  if (m.order == Order::kOddFirst)
    std::stable_partition(indices.begin(), indices.end(), [](int i) { return i % 2 == 1; });
  if (m.order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), m.random);
  return indices;
}

int warps() { return (m.count + kWarp - 1) / kWarp; }
int lanes_of(int warp) { return std::min(kWarp, m.count - warp * kWarp); }

// Runs the threads of a warp once each, where they can; whether one could.
bool pass(int warp) {
  bool any = false;
  for (int l : ordered(lanes_of(warp))) {
    Thread& thread = m.threads[warp * kWarp + l];
    if (thread.state != State::kReady) continue;
    any = true;
    enter(thread);
    if (!m.error.empty()) return false;
  }
  return any;
}

std::string list(const char* what, State state) {
  std::string threads;
  int count = 0;
  for (int i = 0; i < m.count; ++i) {
    if (m.threads[i].state != state) continue;
    if (++count > 8) continue;
    threads += (count > 1 ? ", " : "") + std::to_string(i);
    if (state == State::kAtWarp) threads += std::string(" at ") + m.threads[i].operation;
  }
  if (count == 0) return "";
  return std::string("; ") + what + ": " + threads +
         (count > 8 ? " and " + std::to_string(count - 8) + " more" : "");
}

void run_block() {
  for (;;) {
    bool any = false;
    for (int warp : ordered(warps())) {
      const bool to_the_barrier =
          m.order != Order::kInterleaved && (m.order != Order::kRandom || m.random() % 2);
      while (pass(warp)) {
        any = true;
        if (!to_the_barrier) break;
      }
      if (!m.error.empty()) return;
    }
    if (any) continue;
    const auto in = [](State state) { return [state](const Thread& thread) { return thread.state == state; }; };
    const auto begin = m.threads.begin(), end = begin + m.count;
    if (std::all_of(begin, end, in(State::kEnded))) return;
    if (!std::all_of(begin, end, in(State::kAtBarrier))) {
      m.error = "deadlock" + list("at the block's barrier are threads", State::kAtBarrier) +
                list("at an operation of their warp are threads", State::kAtWarp) +
                list("ended are threads", State::kEnded);
      return;
    }
    for (int i = 0; i < m.count; ++i) m.threads[i].state = State::kReady;
  }
}

unsigned char* stack_bottom(int i) { return m.stacks + i * kStackBytes; }

void start_block(dim3 block) {
  std::memset(m.shared, kPoison, m.shared_bytes);
  for (int i = 0; i < m.count; ++i) {
    Thread& thread = m.threads[i];
    thread.state = State::kReady;
    thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.copies.clear();
    thread.groups = 0;
    // Tops at different lines of the caches, or all stacks would share a few.
    const int colour = i % 64 * 192 + kWarp;
    thread.fiber.start(stack_bottom(i), stack_bottom(i + 1) - colour, run_thread);
  }
}

std::string where() {
  const auto triple = [](auto v) {
    return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
  };
  return "block (" + triple(blockIdx) + ")";
}

}  // namespace

const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* argument) {
  static std::string result;
  const std::lock_guard<std::mutex> lock(m.running);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return "invalid configuration argument";
  if (shared_bytes > m.shared_limit) return "too much shared memory requested for launch";
  if (m.stacks == nullptr) {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return "out of memory";
    m.stacks = static_cast<unsigned char*>(memory);
  }
  m.count = static_cast<int>(threads);
  m.body = body;
  m.argument = argument;
  m.error.clear();
  m.random.seed(m.seed);
  blockDim = block;
  gridDim = grid;
  m.shared_bytes = shared_bytes;
  m.shared = static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
  for (int b : ordered(static_cast<int>(blocks))) {
    const unsigned index = b;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    start_block(block);
    run_block();
    if (!m.error.empty()) break;
  }
  std::free(m.shared);
  if (m.error.empty()) return nullptr;
  result = where() + ": " + m.error;
  return result.c_str();
}

size_t shared_memory_limit() { return m.shared_limit; }

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  if (m.current == nullptr) {
    std::fprintf(stderr, "%s\n", message);
    std::abort();
  }
  m.error = "thread " + std::to_string(index_of(*m.current)) + ": " + message;
  for (;;) leave(State::kEnded);
}

unsigned char* shared_memory() { return m.shared; }

int lane() { return index_of(*m.current) % kWarp; }

static void check_shared(const char* what, int lane, const void* address, int bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("%s: the shared address of lane %d is not aligned to %d bytes", what, lane, bytes);
  if (p < m.shared || p + bytes > m.shared + m.shared_bytes)
    fail("%s: the address of lane %d is at byte %td of %zu bytes of shared memory", what, lane, p - m.shared,
         m.shared_bytes);
}

void read_matrix_row(int lane, const void* row, uint16_t (&values)[8]) {
  check_shared("ldmatrix", lane, row, sizeof(values));
  std::memcpy(values, row, sizeof(values));
}

void sync_threads() { leave(State::kAtBarrier); }

void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes)) {
  Thread& me = *m.current;
  const int l = lane();
  Thread* warp = &me - l;
  if ((mask >> l & 1) == 0) fail("%s: lane %d is not in its own mask %08x", operation, l, mask);
  me.operation = operation;
  me.mask = mask;
  // Anything else than null marks a lane of the mask.
  me.operands = operands != nullptr ? operands : &me;
  me.state = State::kAtWarp;
  void* lanes[kWarp] = {};
  const int count = lanes_of(index_of(*warp) / kWarp);
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (i >= count || warp[i].state != State::kAtWarp) return leave(State::kAtWarp);
    if (warp[i].mask != mask || std::strcmp(warp[i].operation, operation) != 0)
      fail("%s of lanes %08x meets %s of lanes %08x in lane %d", operation, mask, warp[i].operation,
           warp[i].mask, i);
    lanes[i] = warp[i].operands;
  }
  compute(lanes);
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) warp[i].state = State::kReady;
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  check_shared("cp.async", lane(), shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("cp.async: the global address is not aligned to %d bytes", bytes);
  if (valid < 0 || valid > bytes) fail("cp.async: %d valid bytes of %d", valid, bytes);
  std::memset(shared, kPoison, bytes);
  Thread& me = *m.current;
  me.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                       valid, me.groups});
}

void copy_async_commit() { ++m.current->groups; }

void copy_async_wait(int pending) {
  Thread& me = *m.current;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < me.groups - pending; ++copy) {
    if (copy->valid > 0) std::memcpy(copy->shared, copy->global, copy->valid);
    std::memset(copy->shared + copy->valid, 0, copy->bytes - copy->valid);
  }
  me.copies.erase(me.copies.begin(), copy);
}

void multiply(float* d, const float* a, const float* b, int K) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) d[i * 8 + j] += a[i * K + k] * b[k * 8 + j];
}

}  // namespace cuda_host

// ---------------------------------------------------------------------------------------------------------------
// For the tests

extern "C" {

// forward, reverse, odd_first, interleaved, or random with a seed, as in "random:1"; whether there is such an
// order.
CUDA_HOST_EXPORT bool cuda_host_set_order(const char* name) {
  using namespace cuda_host;
  const char* const names[] = {"forward", "reverse", "odd_first", "interleaved", "random"};
  for (int i = 0; i < 5; ++i) {
    const size_t length = std::strlen(names[i]);
    if (std::strncmp(name, names[i], length) != 0 || (name[length] != 0 && name[length] != ':')) continue;
    m.order = static_cast<Order>(i);
    m.seed = name[length] == ':' ? std::atoi(name + length + 1) : 0;
    return true;
  }
  return false;
}

// Returns the limit before.
CUDA_HOST_EXPORT size_t cuda_host_set_shared_memory_limit(size_t bytes) {
  return std::exchange(cuda_host::m.shared_limit, bytes);
}

// What g++ -fsanitize=alignment,bounds calls, in place of its library.

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(const SourceLocation* where, uintptr_t address) {
  cuda_host::fail("misaligned access of %#zx at %s:%u", size_t(address), where->file, where->line);
}

void __ubsan_handle_out_of_bounds(const SourceLocation* where, uintptr_t index) {
  cuda_host::fail("index %zd is out of bounds at %s:%u", ssize_t(index), where->file, where->line);
}
}
