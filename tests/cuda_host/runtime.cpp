#include <dlfcn.h>
#include <runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "races.h"
#include "threads.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

// What a thread of the grid reads; to the kernels these are constants.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
// Shared memory lies in the middle of a region that holds nothing else, so that overruns are recognised.
constexpr size_t kWindowBytes = 1 << 20, kSharedOffset = 384 << 10;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

enum class Wait { kNone, kBarrier, kWarp, kEnd };

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes, valid, group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  Wait wait;
  const void* caller;  // the kernel's code that waits
  // At an operation of the warp:
  const char* operation;
  unsigned mask;
  void* operands;
  // Asynchronous copies under way, oldest first, and the number of groups committed:
  std::vector<Copy> copies;
  int groups;
};

enum class Order { kForward, kReverse, kOddFirst, kInterleaved, kRandom };
constexpr const char* kOrders[] = {"forward", "reverse", "odd_first", "interleaved", "random"};

// The numbers from 0 on, in the order that the test asked for.
class Sequence {
 public:
  void start(int count, Order order, std::mt19937& random) {
    numbers_.resize(count);
    std::iota(numbers_.begin(), numbers_.end(), 0);
    if (order == Order::kReverse) std::reverse(numbers_.begin(), numbers_.end());
    if (order == Order::kOddFirst)
      std::stable_partition(numbers_.begin(), numbers_.end(), [](int i) { return i % 2 == 1; });
    random_ = order == Order::kRandom ? &random : nullptr;
  }
  const std::vector<int>& next() {
    if (random_ != nullptr) std::shuffle(numbers_.begin(), numbers_.end(), *random_);
    return numbers_;
  }

 private:
  std::vector<int> numbers_;
  std::mt19937* random_;
};

struct Machine {
  std::mutex running;
  size_t shared_limit = 227 << 10;
  Order order = Order::kForward;
  unsigned seed = 0;
  unsigned char *stacks = nullptr, *window = nullptr;

  // The launch under way
  void (*body)(const void*);
  const void* argument;
  int count, warps;
  unsigned char* shared;
  size_t shared_bytes;
  std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
  unsigned arrived[kMaxThreads / kWarp];  // lanes of each warp that wait for others of it
  Fiber scheduler;
  Thread* current = nullptr;
  std::mt19937 random;
  Sequence blocks, warp_order, lane_order;
  std::string error;

  // Barriers, by the kernel's line: those that were met while recording, and the one to pass over.
  bool recording = false;
  std::map<const void*, std::string> lines;
  std::set<std::string> met;
  std::string dropped;

  // Launches that are noted instead of being run, one a line.
  bool only_noting = false;
  std::string launches;
} m;

int number(const Thread& thread) { return static_cast<int>(&thread - m.threads.data()); }

// ---------------------------------------------------------------------------------------------------------------
// Threads

void leave(Wait wait) {
  m.current->wait = wait;
  m.current->fiber.switch_to(m.scheduler);
}

[[noreturn]] void run_thread() {
  m.body(m.argument);
  for (;;) leave(Wait::kEnd);
}

// Runs one thread until it has to wait.
void enter(Thread& thread) {
  m.current = &thread;
  threadIdx = thread.index;
  m.scheduler.switch_to(thread.fiber);
  m.current = nullptr;
}

// Runs the threads of a warp once each, where they can; whether one could.
bool run_warp_once(int warp) {
  bool any = false;
  for (const int l : m.lane_order.next()) {
    const int i = warp * kWarp + l;
    if (i >= m.count || m.threads[i].wait != Wait::kNone) continue;
    any = true;
    enter(m.threads[i]);
    if (!m.error.empty()) return false;
  }
  return any;
}

// Runs every warp: to the barrier at once, or as far as the first operation of the warp; whether one could.
bool run_warps() {
  bool any = false;
  for (const int warp : m.warp_order.next()) {
    const bool once = m.order == Order::kInterleaved || (m.order == Order::kRandom && m.random() % 2 == 0);
    while (run_warp_once(warp)) {
      any = true;
      if (once) break;
    }
    if (!m.error.empty()) break;
  }
  return any;
}

// "; 34 threads at __syncthreads (file:line), the first is 1"
std::string waiting(Wait wait) {
  int count = 0, first = 0;
  for (int i = m.count - 1; i >= 0; --i) {
    if (m.threads[i].wait != wait) continue;
    ++count;
    first = i;
  }
  if (count == 0) return "";
  std::string text = "; " + std::to_string(count) + (count == 1 ? " thread " : " threads ");
  if (wait == Wait::kEnd) {
    text += "ended";
  } else {
    const Thread& thread = m.threads[first];
    text += std::string("at ") + (wait == Wait::kBarrier ? "__syncthreads" : thread.operation);
    text += source_line(thread.caller);
  }
  return text + ", the first is " + std::to_string(first);
}

void run_block() {
  const auto begin = m.threads.begin(), end = begin + m.count;
  const auto all = [&](Wait wait) {
    return std::all_of(begin, end, [&](const Thread& thread) { return thread.wait == wait; });
  };
  for (;;) {
    while (run_warps()) {
    }
    if (!m.error.empty() || all(Wait::kEnd)) return;
    if (!all(Wait::kBarrier)) {
      m.error = "deadlock" + waiting(Wait::kBarrier) + waiting(Wait::kWarp) + waiting(Wait::kEnd);
      return;
    }
    if (races::enabled) races::barrier();
    for (auto thread = begin; thread != end; ++thread) thread->wait = Wait::kNone;
  }
}

void start_block(unsigned index) {
  blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
  std::memset(m.shared, kPoison, m.shared_bytes);
  if (races::enabled) races::start_block({m.shared, m.shared + m.shared_bytes});
  std::fill_n(m.arrived, m.warps, 0);
  for (int i = 0; i < m.count; ++i) {
    Thread& thread = m.threads[i];
    const unsigned t = i;
    thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.wait = Wait::kNone;
    thread.copies.clear();
    thread.groups = 0;
    unsigned char* const stack = m.stacks + i * kStackBytes;
    // Not all tops at the same place of a page: they would share a few lines of the caches.
    thread.fiber.start(stack, stack + kStackBytes - i % 64 * 192, run_thread);
  }
}

bool reserve_memory() {
  if (m.stacks != nullptr) return true;
  void* const memory = mmap(nullptr, kMaxThreads * kStackBytes + kWindowBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  m.stacks = static_cast<unsigned char*>(memory);
  // The lowest page of a stack is not there: an overflow is a fault, and no write to the next stack.
  for (int i = 0; i < kMaxThreads; ++i) mprotect(m.stacks + i * kStackBytes, getpagesize(), PROT_NONE);
  m.window = m.stacks + kMaxThreads * kStackBytes;
  m.shared = m.window + kSharedOffset;
  return true;
}

// The stacks of abandoned threads and the last launch's shared memory may be poisoned.
void start_launch() {
  ASAN_UNPOISON_MEMORY_REGION(m.stacks, kMaxThreads * kStackBytes + kWindowBytes);
  ASAN_POISON_MEMORY_REGION(m.window, kSharedOffset);
  ASAN_POISON_MEMORY_REGION(m.shared + m.shared_bytes, kWindowBytes - kSharedOffset - m.shared_bytes);
  if (races::enabled) races::start_launch({m.stacks, m.window}, {m.window, m.window + kWindowBytes}, m.count);
  m.error.clear();
  m.random.seed(m.seed);
  m.warp_order.start(m.warps, m.order, m.random);
  m.lane_order.start(kWarp, m.order, m.random);
}

std::string run_command(const std::string& command) {
  std::string output;
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char line[512];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) output += line;
  pclose(pipe);
  return output;
}

}  // namespace

int current_thread() { return m.current == nullptr ? -1 : number(*m.current); }

std::string source_line(const void* caller) {
  Dl_info library;
  if (dladdr(caller, &library) == 0) return "";
  const size_t offset = static_cast<const char*>(caller) - static_cast<const char*>(library.dli_fbase);
  char command[512];
  // The call stands before the address that it returns to.
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", library.dli_fname,
                offset - 1);
  // Innermost first; what the harness inlined says nothing.
  std::string lines = run_command(command);
  while (!lines.empty()) {
    const size_t end = lines.find('\n');
    const std::string line = lines.substr(0, std::min(end, lines.find(" (discriminator")));
    lines.erase(0, end == lines.npos ? end : end + 1);
    if (line.compare(0, 2, "??") == 0) return "";
    const bool harness =
        line.find("cuda_host/device/") != line.npos || line.find("cuda_host/include/") != line.npos;
    if (!harness) return " (" + line.substr(line.rfind('/') + 1) + ")";
  }
  return "";
}

// ---------------------------------------------------------------------------------------------------------------
// The host's side

static void note_launch(const void* kernel, uint64_t blocks, uint64_t threads, size_t shared_bytes) {
  Dl_info library;
  if (dladdr(kernel, &library) == 0) return;
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  for (const uint64_t value : {uint64_t(offset), blocks, threads, uint64_t(shared_bytes)})
    m.launches += std::to_string(value) + " ";
  m.launches += "\n";
}

const char* run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
                const void* argument) {
  const std::lock_guard<std::mutex> lock(m.running);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > m.shared_limit)
    return "invalid argument";
  if (m.only_noting) {
    note_launch(kernel, blocks, threads, shared_bytes);
    return nullptr;
  }
  if (!reserve_memory()) return "out of memory";
  m.count = static_cast<int>(threads);
  m.warps = (m.count + kWarp - 1) / kWarp;
  m.body = body;
  m.argument = argument;
  m.shared_bytes = shared_bytes;
  blockDim = block;
  gridDim = grid;
  start_launch();
  m.blocks.start(static_cast<int>(blocks), m.order, m.random);
  for (const int b : m.blocks.next()) {
    start_block(b);
    run_block();
    if (m.error.empty()) continue;
    m.error += " [block " + std::to_string(b) + "]";
    return m.error.c_str();
  }
  return nullptr;
}

size_t shared_memory_limit() { return m.shared_limit; }

// ---------------------------------------------------------------------------------------------------------------
// A thread's side

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
  m.error = message;
  for (;;) leave(Wait::kEnd);
}

unsigned char* shared_memory() { return m.shared; }

int lane() { return number(*m.current) % kWarp; }

// Whether the test wants this barrier to do nothing.
static bool is_dropped(const char* barrier, const void* caller) {
  if (!m.recording && m.dropped.empty()) return false;
  std::string& line = m.lines[caller];
  if (line.empty()) line = barrier + source_line(caller);
  if (m.recording) m.met.insert(line);
  return line == m.dropped;
}

void sync_threads() {
  const void* const caller = __builtin_return_address(0);
  if (is_dropped("__syncthreads", caller)) return;
  m.current->caller = caller;
  leave(Wait::kBarrier);
}

void sync_warp(unsigned mask) {
  if (is_dropped("__syncwarp", __builtin_return_address(0))) return;
  together(
      "__syncwarp", mask, nullptr,
      [](Lanes& lanes) {
        if (races::enabled) races::warp_barrier(number(*m.current) / kWarp * kWarp, lanes);
      },
      __builtin_return_address(0));
}

void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes)) {
  together(operation, mask, operands, compute, __builtin_return_address(0));
}

void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes),
              const void* caller) {
  Thread& me = *m.current;
  const int l = lane(), warp = number(me) / kWarp;
  Thread* const threads = &m.threads[warp * kWarp];
  unsigned& arrived = m.arrived[warp];
  if ((mask >> l & 1) == 0) fail("%s: lane %d is not in its own mask %08x", operation, l, mask);
  me.caller = caller;
  me.operation = operation;
  me.mask = mask;
  me.operands = operands != nullptr ? operands : &me;  // not null, which lanes outside the mask are
  arrived |= 1u << l;
  if ((arrived & mask) != mask) return leave(Wait::kWarp);
  void* lanes[kWarp] = {};
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Thread& other = threads[i];
    if (other.mask != mask || std::strcmp(other.operation, operation) != 0)
      fail("lane %d is at %s of lanes %08x%s, lane %d at %s of lanes %08x%s", l, operation, mask,
           source_line(me.caller).c_str(), i, other.operation, other.mask, source_line(other.caller).c_str());
    lanes[i] = other.operands;
  }
  compute(lanes);
  arrived &= ~mask;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) threads[i].wait = Wait::kNone;
}

static void check_shared(const char* operation, const Thread& thread, const void* address, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("%s: thread %d: the shared address is not aligned to %zu bytes%s", operation, number(thread), bytes,
         source_line(thread.caller).c_str());
  if (p < m.shared || p + bytes > m.shared + m.shared_bytes)
    fail("%s: thread %d: byte %td of %zu bytes of shared memory%s", operation, number(thread), p - m.shared,
         m.shared_bytes, source_line(thread.caller).c_str());
}

void read_matrix_row(int lane, const void* row, uint16_t (&values)[8]) {
  const int warp = number(*m.current) / kWarp * kWarp;
  const Thread& thread = m.threads[warp + lane];
  check_shared("ldmatrix", thread, row, sizeof(values));
  if (races::enabled) {
    // The row goes to four lanes.
    for (int i = 0; i < 4; ++i)
      races::access(warp + lane % 8 * 4 + i, row, sizeof(values), races::Access::kRead, thread.caller);
  }
  std::memcpy(values, row, sizeof(values));
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  Thread& me = *m.current;
  me.caller = __builtin_return_address(0);
  check_shared("cp.async", me, shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("cp.async: thread %d: the global address is not aligned to %d bytes%s", number(me), bytes,
         source_line(me.caller).c_str());
  if (valid < 0 || valid > bytes)
    fail("cp.async: thread %d: %d valid bytes of %d%s", number(me), valid, bytes,
         source_line(me.caller).c_str());
  if (races::enabled) {
    races::access(number(me), global, valid, races::Access::kRead, me.caller);
    races::start_copy(number(me), shared, bytes, me.caller);
  }
  std::memset(shared, kPoison, bytes);
  me.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                       valid, me.groups});
}

void copy_async_commit() { ++m.current->groups; }

void copy_async_wait(int pending) {
  if (is_dropped("cp_async_wait", __builtin_return_address(0))) return;
  Thread& me = *m.current;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < me.groups - pending; ++copy) {
    if (copy->valid > 0) std::memcpy(copy->shared, copy->global, copy->valid);
    std::memset(copy->shared + copy->valid, 0, copy->bytes - copy->valid);
    if (races::enabled) races::finish_copy(number(me), copy->shared, copy->bytes);
  }
  me.copies.erase(me.copies.begin(), copy);
}

}  // namespace cuda_host

// ---------------------------------------------------------------------------------------------------------------
// For the tests

extern "C" {

#define CUDA_HOST_EXPORT __attribute__((visibility("default")))

// Takes a name of kOrders; random has a seed, as in "random:1". Whether there is such an order.
CUDA_HOST_EXPORT bool cuda_host_set_order(const char* order) {
  using namespace cuda_host;
  const std::string name(order, std::strcspn(order, ":"));
  const auto found = std::find(std::begin(kOrders), std::end(kOrders), name);
  if (found == std::end(kOrders)) return false;
  m.order = static_cast<Order>(found - std::begin(kOrders));
  m.seed = name.size() < std::strlen(order) ? std::atoi(order + name.size() + 1) : 0;
  return true;
}

// Starts to note the barriers that kernels meet, or stops and returns them, one a line.
CUDA_HOST_EXPORT const char* cuda_host_record_barriers(bool start) {
  using cuda_host::m;
  static std::string lines;
  lines.clear();
  for (const std::string& line : m.met) lines += line + "\n";
  m.met.clear();
  m.recording = start;
  return lines.c_str();
}

// From now on kernels pass over this barrier, one of those recorded; none if empty.
CUDA_HOST_EXPORT void cuda_host_drop_barrier(const char* line) { cuda_host::m.dropped = line; }

// From now on launches are noted and not run; or, at the end, what was noted, one launch a line: the kernel's
// address in this library, blocks, threads of a block, bytes of shared memory.
CUDA_HOST_EXPORT const char* cuda_host_note_launches(bool start) {
  using cuda_host::m;
  static std::string noted;
  noted = std::exchange(m.launches, "");
  m.only_noting = start;
  return noted.c_str();
}

CUDA_HOST_EXPORT void cuda_host_find_races(bool enabled) { cuda_host::races::enabled = enabled; }

// Returns the limit before.
CUDA_HOST_EXPORT size_t cuda_host_set_shared_memory_limit(size_t bytes) {
  return std::exchange(cuda_host::m.shared_limit, bytes);
}

// csrc/cuda/ops.cpp asks PyTorch for the stream of a CUDA tensor; here there are none, and PyTorch may lack
// CUDA.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }

// What g++ -fsanitize=alignment,bounds calls, in place of its library.

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(const SourceLocation* where, uintptr_t address) {
  cuda_host::fail("misaligned access of %#zx (%s:%u)", size_t(address), where->file, where->line);
}

void __ubsan_handle_out_of_bounds(const SourceLocation* where, uintptr_t index) {
  cuda_host::fail("index %zd is out of bounds (%s:%u)", static_cast<ssize_t>(index), where->file, where->line);
}
}
