// Work on the threads of XLA's own pool.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace flaxmill {

// As XLA's own arithmetic has it on a CPU, subnormal numbers count as zero: on every thread, whoever started it.
class WithoutSubnormals {
 public:
#if defined(__x86_64__)
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  WithoutSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
  }
  ~WithoutSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Calls chunk(0) to chunk(count - 1), each once, on this thread and on those of the pool that have time.
//
// A handler that waited for tasks to be started could wait for ever, where all threads of the pool are handlers that
// wait. So this thread takes chunks as well, and in the end waits only for those that somebody has begun.
template <class Chunk>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, const Chunk& chunk) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // `chunk` lives as long as this call: who comes late finds no number left, and does not touch it.
  auto work = [shared, count, &chunk] {
    WithoutSubnormals scope;
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      chunk(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < pool.num_threads() && i < count; ++i) {
    auto helper = work;
    pool.Schedule(std::move(helper));
  }
  work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) pause();
    else std::this_thread::yield();
  }
}

}  // namespace flaxmill
