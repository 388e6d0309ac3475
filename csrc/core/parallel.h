// Note [thread-independent codes]: a BLAS product may round differently for another number of
// threads, and a flipped bit can flip a code. So on the CPU work is cut into chunks whose size
// depends on the problem only, and every chunk runs on one thread, BLAS inside it included: a BLAS
// called from an active parallel region stays on the calling thread. MKL does, but on some CPUs
// still cuts long sums into as many parts as it has threads: it must be told that it has one.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstdint>

// Of the MKL in torch's library; its headers do not come with torch.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int count);

namespace torchquant {

// While it lives, products of the calling thread are made as if there were no other.
class OneBlasThread {
 public:
  OneBlasThread() : before_(set(1)) {}
  ~OneBlasThread() { set(before_); }
  OneBlasThread(const OneBlasThread&) = delete;
  OneBlasThread& operator=(const OneBlasThread&) = delete;

 private:
  static int set(int count) {
    return MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(count) : 0;
  }
  int before_;
};

// Runs work(begin, end) for parts of 0..count, each on one thread. At least two tasks are announced
// so that even a single one runs inside a parallel region.
template <class Work>
void for_each_part(int64_t count, const Work& work) {
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView
        guard;  // the dispatch state of the caller does not follow into worker threads
    const OneBlasThread one_blas_thread;
    if (begin < count) work(begin, std::min(end, count));
  });
}

// Runs task(index) for index 0..count-1.
template <class Task>
void for_each_chunk(int64_t count, const Task& task) {
  for_each_part(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Runs task() on one thread, BLAS and LAPACK inside it included.
template <class Task>
void run_on_one_thread(const Task& task) {
  for_each_chunk(1, [&](int64_t) { task(); });
}

}  // namespace torchquant
