// Fibers: each emulated thread has its own stack, and yields explicitly.
#pragma once

#include <cstddef>

namespace emulator {

// The saved state of a suspended fiber, or of the scheduler. Plain data, valid until it is resumed.
struct Context {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};

// A context whose first resumption calls entry() on the stack [bottom, bottom + bytes). entry must
// not return.
Context make_context(char* bottom, size_t bytes, void (*entry)());

// Saves the running code to `from` and resumes `to`.
void switch_context(Context& from, Context& to);

// An entry function calls this first.
void on_entry();

// Stacks with an unmapped page below each, so that an overflow stops the process at once.
class Stacks {
 public:
  explicit Stacks(size_t bytes) : bytes_(bytes) {}
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  void reserve(size_t count);
  char* bottom(size_t i) const;
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  size_t count_ = 0;
  char* memory_ = nullptr;
};

}  // namespace emulator
