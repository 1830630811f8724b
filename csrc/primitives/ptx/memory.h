#pragma once

namespace sink_attention::primitives {

template <class T>
SA_DEVICE T load_global(const T* source) {
  return *source;
}
template <class T>
SA_DEVICE void store_global(T* destination, T value) {
  *destination = value;
}
template <class T>
SA_DEVICE T load_shared(const T* source) {
  return *source;
}
template <class T>
SA_DEVICE void store_shared(T* destination, T value) {
  *destination = value;
}

}  // namespace sink_attention::primitives
