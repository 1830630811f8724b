#include "emulator/global_memory.h"

#include <sstream>
#include <utility>

namespace emulator {
namespace {

std::vector<Buffer> visible;
size_t last_found = 0;  // neighbouring accesses mostly hit the same buffer

bool holds(const Buffer& buffer, const char* begin, const char* end) {
  return buffer.begin <= begin && end <= buffer.end;
}

std::string describe(const Buffer& buffer, const char* address) {
  std::ostringstream text;
  text << buffer.name << " (" << buffer.end - buffer.begin << " bytes) at byte "
       << address - buffer.begin;
  return text.str();
}

}  // namespace

VisibleBuffers::VisibleBuffers(std::vector<Buffer> buffers) : before_(std::move(visible)) {
  visible = std::move(buffers);
  last_found = 0;
}

VisibleBuffers::~VisibleBuffers() {
  visible = std::move(before_);
  last_found = 0;
}

std::string why_not_accessible(const void* address, int64_t bytes, Access access) {
  const char* begin = static_cast<const char*>(address);
  const char* end = begin + bytes;
  if (reinterpret_cast<uintptr_t>(begin) % static_cast<uintptr_t>(bytes) != 0) {
    return "an address that is not aligned to " + std::to_string(bytes) + " bytes";
  }
  const bool writes = access == Access::kWrite;
  if (last_found < visible.size() && holds(visible[last_found], begin, end) &&
      (!writes || visible[last_found].writable)) {
    return "";
  }
  const Buffer* read_only = nullptr;
  const Buffer* nearest = nullptr;
  int64_t distance = 0;
  for (size_t i = 0; i < visible.size(); ++i) {
    const Buffer& buffer = visible[i];
    if (holds(buffer, begin, end)) {
      if (!writes || buffer.writable) {
        last_found = i;
        return "";
      }
      read_only = &buffer;
    }
    const int64_t away = begin < buffer.begin ? buffer.begin - begin : end - buffer.end;
    if (nearest == nullptr || away < distance) {
      nearest = &buffer;
      distance = away;
    }
  }
  if (read_only != nullptr) return "a write to read-only " + describe(*read_only, begin);
  if (nearest == nullptr) return "an access to global memory, of which no buffer was named";
  return std::string(writes ? "a write" : "a read") + " out of bounds, nearest to " +
         describe(*nearest, begin);
}

}  // namespace emulator
