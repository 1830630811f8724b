#include "emulator/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kGuardBytes = 4096;
Context* left = nullptr;  // where the last switch came from

}  // namespace

#if defined(__x86_64__)

// Saves the System V ABI's callee-saved registers on the old stack and restores them from the new
// one. It jumps instead of returning: the processor predicts a return to the last call, which
// another fiber never resumes.
asm(R"(
.text
.type sink_attention_emulator_switch, @function
sink_attention_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size sink_attention_emulator_switch, .-sink_attention_emulator_switch
)");
extern "C" void sink_attention_emulator_switch(void** from, void* to);

namespace {
void jump(Context& from, Context& to) {
  sink_attention_emulator_switch(&from.stack_pointer, to.stack_pointer);
}
void prepare(Context& context, void (*entry)()) {
  const uintptr_t top = reinterpret_cast<uintptr_t>(context.stack_bottom) + context.stack_bytes;
  // Six registers, the entry's address, and the stack alignment that a function expects at its
  // entry.
  void** frame = reinterpret_cast<void**>((top & ~uintptr_t{15}) - 8) - 7;
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(entry);
  frame[7] = nullptr;
  context.stack_pointer = frame;
}
}  // namespace

#else  // slower: one system call per switch

namespace {
void jump(Context& from, Context& to) {
  ucontext_t here;
  from.stack_pointer = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to.stack_pointer));
}
void prepare(Context& context, void (*entry)()) {
  // The context itself is stored at the bottom of its stack.
  char* bottom = static_cast<char*>(const_cast<void*>(context.stack_bottom));
  auto* start = new (bottom) ucontext_t;
  getcontext(start);
  start->uc_stack.ss_sp = bottom + sizeof(ucontext_t);
  start->uc_stack.ss_size = context.stack_bytes - sizeof(ucontext_t);
  start->uc_link = nullptr;
  makecontext(start, entry, 0);
  context.stack_pointer = start;
}
}  // namespace

#endif

Context make_context(char* bottom, size_t bytes, void (*entry)()) {
  Context context;
  context.stack_bottom = bottom;
  context.stack_bytes = bytes;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that was abandoned in a failed launch has not cleaned up its red zones.
  __asan_unpoison_memory_region(bottom, bytes);
#endif
  prepare(context, entry);
  return context;
}

void on_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &left->stack_bottom, &left->stack_bytes);
#endif
}

void switch_context(Context& from, Context& to) {
  left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  jump(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &left->stack_bottom, &left->stack_bytes);
#endif
}

Stacks::~Stacks() {
  if (memory_ != nullptr) munmap(memory_, count_ * (bytes_ + kGuardBytes));
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  if (memory_ != nullptr) munmap(memory_, count_ * (bytes_ + kGuardBytes));
  const size_t stride = bytes_ + kGuardBytes;
  void* memory = mmap(nullptr, count * stride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * stride, kGuardBytes, PROT_NONE);
}

char* Stacks::bottom(size_t i) const { return memory_ + i * (bytes_ + kGuardBytes) + kGuardBytes; }

}  // namespace emulator
