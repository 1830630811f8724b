#include "emulator/global_memory.h"

#include <algorithm>
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

bool is_accessible(const void* address, int64_t bytes, Access access, int64_t alignment) {
  if (alignment == 0) alignment = bytes;
  const char* begin = static_cast<const char*>(address);
  if ((reinterpret_cast<uintptr_t>(begin) & static_cast<uintptr_t>(alignment - 1)) != 0)
    return false;
  const bool writes = access == Access::kWrite;
  const auto allows = [&](const Buffer& buffer) {
    return holds(buffer, begin, begin + bytes) && (!writes || buffer.writable);
  };
  if (last_found < visible.size() && allows(visible[last_found])) return true;
  for (size_t i = 0; i < visible.size(); ++i) {
    if (!allows(visible[i])) continue;
    last_found = i;
    return true;
  }
  return false;
}

std::string why_not_accessible(const void* address, int64_t bytes, Access access,
                               int64_t alignment) {
  if (alignment == 0) alignment = bytes;
  const char* begin = static_cast<const char*>(address);
  const char* end = begin + bytes;
  const bool writes = access == Access::kWrite;
  const std::string verb = writes ? "a write" : "a read";
  const Buffer* nearest = nullptr;
  int64_t distance = 0;
  for (const Buffer& buffer : visible) {
    const int64_t away = std::max({buffer.begin - begin, end - buffer.end, std::ptrdiff_t{0}});
    if (nearest == nullptr || away < distance) {
      nearest = &buffer;
      distance = away;
    }
  }
  if (address == nullptr) return verb + " of a null pointer";
  if (nearest == nullptr) return verb + " of global memory, of which no buffer was named";
  if ((reinterpret_cast<uintptr_t>(begin) & static_cast<uintptr_t>(alignment - 1)) != 0) {
    return verb + " that is not aligned to " + std::to_string(alignment) + " bytes, nearest to " +
           describe(*nearest, begin);
  }
  if (distance == 0) return "a write to read-only " + describe(*nearest, begin);
  return verb + " out of bounds, nearest to " + describe(*nearest, begin);
}

}  // namespace emulator
