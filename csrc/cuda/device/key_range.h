// The keys in a query row's window, as the kernels keep them in shared memory.
#pragma once

#include "attention/host_device.h"

namespace sink_attention::cuda {

struct alignas(8) KeyRange {  // keys [begin, end)
  int begin;
  int end;

  // Whether the row sees `key`: it lies in the window, or is one of the sink tokens [0, sink_end)
  // and not after the window.
  SA_HOST_DEVICE bool contains(int key, int sink_end) const {
    return (begin <= key || key < sink_end) && key < end;
  }
};

}  // namespace sink_attention::cuda
