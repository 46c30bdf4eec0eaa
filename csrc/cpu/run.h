// Running kernels: the choice of the instruction set, scratch memory and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace shvit {

// ---------------------------------------------------------------------------------------------------------------
// Choice of the instruction set

inline const std::vector<const Variant*>& supported_variants() {
  static const std::vector<const Variant*> variants = [] {
    std::vector<const Variant*> found = {&kBaselineWide, &kBaseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.insert(found.end(), {&kAvx2Wide, &kAvx2});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        found.push_back(&kAvx512);
        if (__builtin_cpu_supports("avx512bf16")) {
          static const Variant avx512_bf16 = [] {
            Variant variant = kAvx512;
            variant.name = "avx512_bf16";
            variant.fused_bfloat16 = kAvx512Bf16;
            return variant;
          }();
          found.push_back(&avx512_bf16);
          if (__builtin_cpu_is("amd")) {  // Zen 4 and newer, which add beside their multiply-adds
            static const Variant zen4 = [] {
              Variant variant = avx512_bf16;
              variant.name = "zen4";
              variant.fused_float32 = kZen4Fused;
              variant.mixer_float32 = kZen4Mixer;
              return variant;
            }();
            found.push_back(&zen4);
          }
        }
      }
    }
#endif
    return found;
  }();
  return variants;
}

inline std::atomic<const Variant*>& current_variant() {
  static std::atomic<const Variant*> variant = supported_variants().back();
  return variant;
}

// ---------------------------------------------------------------------------------------------------------------
// Running a kernel

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

inline Buffer allocate(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  char* p = static_cast<char*>(std::aligned_alloc(kAlign, (bytes + kAlign) / kAlign * kAlign));
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return Buffer(p);
}

// AddressSanitizer sees what lies beyond memory of exactly the size asked for.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExactSize = true;
#else
constexpr bool kExactSize = false;
#endif

// Memory of this thread, kept for the next call: fresh pages would cost as much as a small kernel.
class Arena {
 public:
  char* reserve(int64_t bytes) {
    if (size_ < bytes || (kExactSize && size_ != bytes)) {
      buffer_.reset();
      size_ = 0;
      buffer_ = allocate(bytes);
      size_ = bytes;
    }
    return buffer_.get();
  }

 private:
  Buffer buffer_;
  int64_t size_ = 0;
};

inline Arena& scratch_arena() {
  thread_local Arena arena;
  return arena;
}

inline Arena& workspace_arena() {
  thread_local Arena arena;
  return arena;
}

inline Arena& sequence_arena() {
  thread_local Arena arena;
  return arena;
}

// Long images and training stage megabytes, sequences of layers tens of them; more is not kept.
constexpr int64_t kKeptWorkspace = 16 << 20, kKeptSequence = 64 << 20;

// Memory for a call: from an arena up to `kept` bytes, beyond that of its own.
class Memory {
 public:
  Memory(Arena& arena, int64_t bytes, int64_t kept)
      : own_(bytes > kept ? allocate(bytes) : Buffer()), data_(own_ ? own_.get() : arena.reserve(bytes)) {}
  char* data() const { return data_; }

 private:
  Buffer own_;
  char* data_;
};

// Below this many operations a second thread costs more than it brings.
constexpr int64_t kFlopsPerThread = 500000;

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see how PyTorch's threads wait for each other, these it does. Neighbouring tasks
// never share a thread, so that it compares what they touch.
template <class Tasks>
void parallel_for(int64_t, int64_t tasks, int64_t, const Tasks& some) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < kThreads && first < tasks; ++first) {
    threads.emplace_back([&some, first, tasks] {
      for (int64_t task = first; task < tasks; task += kThreads) some(task, task + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}
#else
using torch::stable::parallel_for;
#endif

template <class Params>
void run(const Kernel<Params>& kernel, Params& params) {
  const Plan plan = kernel.plan(params);
  const Memory workspace(workspace_arena(), plan.workspace_bytes, kKeptWorkspace);
  params.workspace = workspace.data();
  for (int phase = 0; phase < plan.phases; ++phase) {
    const int64_t tasks = plan.tasks[phase];
    if (tasks == 0) continue;
    const int64_t flops_per_task = plan.flops / tasks + 1;
    const int64_t grain = 1 + (kFlopsPerThread - 1) / flops_per_task;
    parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      char* memory = scratch_arena().reserve(plan.scratch_bytes);
      for (int64_t task = begin; task < end; ++task) kernel.run(params, phase, task, memory);
    });
  }
}

}  // namespace shvit
