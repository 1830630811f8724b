#pragma once

namespace sink_attention::primitives {

// PTX ISA 9.7.13.4, membar and fence.
SA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// PTX ISA 9.7.9.25.4, cp.async.bulk.
SA_DEVICE void bulk_load(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(address),
      "l"(global), "r"(bytes), "r"(internal::address_of(barrier))
      : "memory");
}
SA_DEVICE void bulk_reduce_add(float* global, const float* shared, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(global),
      "r"(address), "r"(bytes)
      : "memory");
}
SA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
template <int kPending>
SA_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}
template <int kPending>
SA_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace sink_attention::primitives
