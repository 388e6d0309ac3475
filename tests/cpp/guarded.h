// An array whose end is the end of accessible memory: what reads or writes behind it dies.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace torchquant {

template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t size = 0) : size_(size) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = static_cast<size_t>(size) * sizeof(T);
    const size_t pages = (used + page - 1) / page * page;
    length_ = pages + page;
    void* const memory =
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    if (mprotect(memory_ + pages, page, PROT_NONE) != 0) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>(memory_ + pages - used);
    for (int64_t i = 0; i < size; ++i) data_[i] = T{};
  }
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (memory_ != nullptr) munmap(memory_, length_);
  }

  T* data() const { return data_; }
  T* data_or_null() const { return size_ == 0 ? nullptr : data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[i]; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }
  bool same_bytes(const Guarded& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, size_ * sizeof(T)) == 0;
  }

 private:
  void swap(Guarded& other) {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(length_, other.length_);
  }

  char* memory_ = nullptr;
  T* data_ = nullptr;
  int64_t size_ = 0;
  size_t length_ = 0;
};

}  // namespace torchquant
