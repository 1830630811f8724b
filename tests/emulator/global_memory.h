// The buffers of global memory that a kernel may read and write, as named by its caller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

enum class Access { kRead, kWrite };

struct Buffer {
  const char* begin;
  const char* end;
  bool writable;
  std::string name;
};

// The buffers of all launches during its lifetime.
class VisibleBuffers {
 public:
  explicit VisibleBuffers(std::vector<Buffer> buffers);
  ~VisibleBuffers();
  VisibleBuffers(const VisibleBuffers&) = delete;
  VisibleBuffers& operator=(const VisibleBuffers&) = delete;

 private:
  std::vector<Buffer> before_;
};

// The default alignment is that of an access of `bytes` bytes, a power of 2.
bool is_accessible(const void* address, int64_t bytes, Access access, int64_t alignment = 0);
// What is wrong with an access.
std::string why_not_accessible(const void* address, int64_t bytes, Access access,
                               int64_t alignment = 0);

}  // namespace emulator
