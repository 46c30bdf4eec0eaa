#include "races.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "threads.h"

namespace cuda_host::races {

bool enabled = false;

namespace {

// Memory is watched in units of two bytes, the smallest type that kernels use.
constexpr size_t kUnit = 2;
constexpr size_t kPage = 4096;

// Threads count the barriers they pass. An access is stamped with the count; other threads know of those
// accesses of a thread that lie before a barrier that both passed.
using Clock = uint32_t;

// Lanes of one warp that read a unit since their last common barrier.
struct Readers {
  uint32_t lanes;
  Clock clock;
  uint16_t warp;
  const void* caller;
};

struct Unit {
  uint32_t block;  // the last one that wrote, counted from 1; 0 for none
  uint16_t writer;
  bool copying;
  Clock clock;
  const void* caller;
  uint32_t reading_block;
  bool read_by_several_blocks;
  // The last warp that read, and the last other one: enough to find a reader that a writer does not know of.
  Readers readers[2];
};

struct Page {
  Unit units[kPage / kUnit] = {};
};

struct State {
  Region ignored, window, shared;
  int threads;
  uint32_t block;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = 0;
  Page* last_page = nullptr;
  std::vector<Unit> shared_units;

  std::vector<Clock> clocks;
  std::vector<Clock> known_to_block;  // of each thread, the accesses that a barrier of the block has published
  std::vector<Clock> known_to_lane;   // [thread][lane]: those that a barrier of the warp has
} s;

bool knows(int thread, int other, Clock clock) {
  return thread == other || s.known_to_block[other] >= clock ||
         (thread / kWarp == other / kWarp && s.known_to_lane[thread * kWarp + other % kWarp] >= clock);
}

Unit& unit_at(const unsigned char* p) {
  if (s.window.has(p)) return s.shared_units[(p - s.shared.begin) / kUnit];
  const uintptr_t address = reinterpret_cast<uintptr_t>(p), number = address / kPage;
  if (number != s.last_number || s.last_page == nullptr) {
    std::unique_ptr<Page>& page = s.pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    s.last_number = number;
    s.last_page = page.get();
  }
  return s.last_page->units[address % kPage / kUnit];
}

std::string place(const unsigned char* p) {
  char text[64];
  if (s.window.has(p))
    std::snprintf(text, sizeof(text), "byte %td of shared memory", p - s.shared.begin);
  else
    std::snprintf(text, sizeof(text), "global memory at %p", static_cast<const void*>(p));
  return text;
}

[[noreturn]] void report(int thread, const char* does, const void* caller, const unsigned char* p,
                         const char* other, const std::string& who, const void* other_caller) {
  fail("race: thread %d %s %s%s, which %s %s%s with no barrier between", thread, does, place(p).c_str(),
       source_line(caller).c_str(), who.c_str(), other, source_line(other_caller).c_str());
}

void check_write_before(int thread, const char* does, const void* caller, const unsigned char* p,
                        const Unit& unit) {
  if (unit.block == 0) return;
  if (unit.block != s.block) {
    if (!s.window.has(p)) report(thread, does, caller, p, "wrote", "another block", unit.caller);
    return;
  }
  if (unit.copying)
    report(thread, does, caller, p, "is copying to asynchronously", "thread " + std::to_string(unit.writer),
           unit.caller);
  if (!knows(thread, unit.writer, unit.clock))
    report(thread, does, caller, p, "wrote", "thread " + std::to_string(unit.writer), unit.caller);
}

void check_reads_before(int thread, const char* does, const void* caller, const unsigned char* p,
                        const Unit& unit) {
  if (unit.reading_block == 0) return;
  if (!s.window.has(p) && (unit.read_by_several_blocks || unit.reading_block != s.block))
    report(thread, does, caller, p, "read", "another block", unit.readers[0].caller);
  if (unit.reading_block != s.block) return;
  for (const Readers& readers : unit.readers)
    for (int l = 0; l < kWarp; ++l) {
      const int reader = readers.warp * kWarp + l;
      if ((readers.lanes >> l & 1) != 0 && !knows(thread, reader, readers.clock))
        report(thread, does, caller, p, "read", "thread " + std::to_string(reader), readers.caller);
    }
}

void note_read(int thread, const void* caller, Unit& unit) {
  if (unit.reading_block != s.block) {
    unit.read_by_several_blocks |= unit.reading_block != 0;
    unit.reading_block = s.block;
    unit.readers[0] = unit.readers[1] = {};
  }
  const uint16_t warp = thread / kWarp;
  const uint32_t lane = 1u << thread % kWarp;
  Readers &last = unit.readers[0], &before = unit.readers[1];
  if (last.warp != warp && last.lanes != 0) std::swap(last, before);
  if (last.warp != warp || last.clock != s.clocks[thread]) last = {0, s.clocks[thread], warp, caller};
  last.lanes |= lane;
}

void note_write(int thread, const void* caller, bool copying, Unit& unit) {
  unit.block = s.block;
  unit.writer = static_cast<uint16_t>(thread);
  unit.clock = s.clocks[thread];
  unit.copying = copying;
  unit.caller = caller;
}

template <class Function>
void each_unit(const void* address, size_t bytes, Function function) {
  const auto* p = static_cast<const unsigned char*>(address);
  const auto* first = p - reinterpret_cast<uintptr_t>(p) % kUnit;
  for (; first < p + bytes; first += kUnit) function(first, unit_at(first));
}

}  // namespace

void start_launch(Region ignored, Region window, int threads) {
  s.ignored = ignored;
  s.window = window;
  s.threads = threads;
  s.block = 0;
  s.pages.clear();
  s.last_page = nullptr;
  std::fill(s.shared_units.begin(), s.shared_units.end(), Unit{});
}

void start_block(Region shared) {
  s.shared = shared;
  ++s.block;
  s.shared_units.resize(std::max(s.shared_units.size(), (shared.end - shared.begin + kUnit - 1) / kUnit));
  s.clocks.assign(s.threads, 1);
  s.known_to_block.assign(s.threads, 0);
  s.known_to_lane.assign(s.threads * kWarp, 0);
}

void barrier() {
  s.known_to_block = s.clocks;
  for (Clock& clock : s.clocks) ++clock;
}

void warp_barrier(int first_thread, Lanes& lanes) {
  Clock known[kWarp] = {};
  for (int l = 0; l < kWarp; ++l) {
    if (lanes[l] == nullptr) continue;
    const Clock* own = &s.known_to_lane[(first_thread + l) * kWarp];
    for (int i = 0; i < kWarp; ++i) known[i] = std::max(known[i], own[i]);
    known[l] = std::max(known[l], s.clocks[first_thread + l]++);
  }
  for (int l = 0; l < kWarp; ++l)
    if (lanes[l] != nullptr) std::memcpy(&s.known_to_lane[(first_thread + l) * kWarp], known, sizeof(known));
}

void access(int thread, const void* address, size_t bytes, Access kind, const void* caller) {
  if (s.ignored.has(address)) return;
  const char* does = kind == Access::kRead ? "reads" : "writes";
  const auto* p = static_cast<const unsigned char*>(address);
  if (s.window.has(p) && (p < s.shared.begin || p + bytes > s.shared.end))
    fail("thread %d %s %zu bytes at byte %td of %td bytes of shared memory%s", thread, does, bytes,
         p - s.shared.begin, s.shared.end - s.shared.begin, source_line(caller).c_str());
  each_unit(address, bytes, [&](const unsigned char* p, Unit& unit) {
    check_write_before(thread, does, caller, p, unit);
    if (kind == Access::kRead) return note_read(thread, caller, unit);
    check_reads_before(thread, does, caller, p, unit);
    note_write(thread, caller, false, unit);
  });
}

void start_copy(int thread, const void* shared, size_t bytes, const void* caller) {
  access(thread, shared, bytes, Access::kWrite, caller);
  each_unit(shared, bytes, [&](auto, Unit& unit) { note_write(thread, caller, true, unit); });
}

void finish_copy(int thread, const void* shared, size_t bytes) {
  each_unit(shared, bytes, [&](auto, Unit& unit) { note_write(thread, unit.caller, false, unit); });
}

}  // namespace cuda_host::races

// ---------------------------------------------------------------------------------------------------------------
// What g++ -fsanitize=thread calls, in place of its library

using cuda_host::races::Access;

static inline void watch(const void* p, size_t bytes, Access kind, const void* caller) {
  if (!cuda_host::races::enabled) return;
  const int thread = cuda_host::current_thread();
  if (thread >= 0) cuda_host::races::access(thread, p, bytes, kind, caller);
}

extern "C" {

#define CUDA_HOST_WATCH(bytes)                                                                              \
  void __tsan_read##bytes(const void* p) { watch(p, bytes, Access::kRead, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(const void* p) { watch(p, bytes, Access::kWrite, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(const void* p) {                                                        \
    watch(p, bytes, Access::kRead, __builtin_return_address(0));                                            \
  }                                                                                                         \
  void __tsan_unaligned_write##bytes(const void* p) {                                                       \
    watch(p, bytes, Access::kWrite, __builtin_return_address(0));                                           \
  }
CUDA_HOST_WATCH(1)
CUDA_HOST_WATCH(2)
CUDA_HOST_WATCH(4)
CUDA_HOST_WATCH(8)
CUDA_HOST_WATCH(16)

void __tsan_read_range(const void* p, size_t bytes) {
  watch(p, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(const void* p, size_t bytes) {
  watch(p, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
}
