#pragma once

namespace sink_attention::primitives {

namespace internal {
SA_DEVICE uint32_t address_of(const Mbarrier* barrier) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}
}  // namespace internal

// PTX ISA 9.7.13.15, mbarrier.
SA_DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(internal::address_of(barrier)),
               "r"(count)
               : "memory");
}
SA_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
SA_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(internal::address_of(barrier))
               : "memory");
}
SA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   internal::address_of(barrier)),
               "r"(bytes)
               : "memory");
}
// try_wait returns after a time limit that the system chooses, so it is repeated.
SA_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(internal::address_of(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace sink_attention::primitives
