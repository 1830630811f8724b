// A buffer of a kernel between guard bytes, so that an access out of bounds does not hit another
// visible buffer.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "emulator/global_memory.h"

namespace emulator {

template <class T>
class DeviceArray {
 public:
  static constexpr size_t kAlignment = 256;  // as cudaMalloc's
  static constexpr size_t kGuardBytes = 1024;

  DeviceArray(std::string name, size_t size, T value = {})
      : name_(std::move(name)),
        size_(size),
        memory_(size * sizeof(T) + 2 * kGuardBytes + kAlignment) {
    for (size_t i = 0; i < size_; ++i) data()[i] = value;
  }
  T* data() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

  Buffer readable() { return buffer(false); }
  Buffer writable() { return buffer(true); }

 private:
  Buffer buffer(bool writable) {
    const char* begin = reinterpret_cast<const char*>(data());
    return {begin, begin + size_ * sizeof(T), writable, name_};
  }

  std::string name_;
  size_t size_;
  std::vector<char> memory_;
};

}  // namespace emulator
