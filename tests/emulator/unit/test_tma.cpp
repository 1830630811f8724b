// TMA boxes: the addresses of their elements, zeros outside the tensor, refused maps, and
// completion at any time.
#include <stdexcept>

#include "emulated.h"

namespace sink_attention::tests {
namespace {

constexpr int kBarrierByte = 48 * 1024;
constexpr int kSharedBytes = kBarrierByte + 64;

Mbarrier* barrier(char* shared, int i = 0) {
  return reinterpret_cast<Mbarrier*>(shared + kBarrierByte) + i;
}
void make(char* shared, int count) {
  if (thread_idx() == 0) {
    for (int i = 0; i < count; ++i) mbarrier_init(barrier(shared, i), 1);
    fence_mbarrier_init();
  }
  sync_threads();
}

// A tensor in 16-bit elements whose strides leave gaps.
struct Tensor {
  DeviceArray<uint16_t> data;
  TensorMapShape shape{};

  Tensor(std::initializer_list<int> sizes, std::initializer_list<int> boxes, Swizzle swizzle)
      : data("tensor", 40000) {
    shape.element_bytes = 2;
    shape.rank = static_cast<int>(sizes.size());
    shape.swizzle = swizzle;
    int64_t stride = 2;
    for (int i = 0; i < shape.rank; ++i) {
      shape.size[i] = sizes.begin()[i];
      shape.box[i] = boxes.begin()[i];
      shape.stride_bytes[i] = i == 0 ? 2 : stride;
      stride = (stride * shape.size[i] + 15) / 16 * 16 + (i == 0 ? 16 : 0);
    }
    shape.base = data.data();
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint16_t>(i % 65521 + 1);
  }
  int box_elements() const {
    int product = 1;
    for (int i = 0; i < shape.rank; ++i) product *= shape.box[i];
    return product;
  }
  // 0 outside.
  uint16_t element(const int (&index)[5]) {
    int64_t offset = 0;
    for (int i = 0; i < shape.rank; ++i) {
      if (index[i] < 0 || index[i] >= shape.size[i]) return 0;
      offset += index[i] * shape.stride_bytes[i];
    }
    return data[static_cast<size_t>(offset / 2)];
  }
};

// By the contract's words (primitives/tma.h).
int swizzled_chunk(Swizzle swizzle, int row, int chunk) {
  switch (swizzle) {
    case Swizzle::k128:
      return chunk ^ row % 8;
    case Swizzle::k64:
      return chunk ^ row / 2 % 4;
    case Swizzle::k32:
      return chunk ^ row / 4 % 2;
    default:
      return chunk;
  }
}

template <int kRank>
void check_box(Tensor& tensor, const int (&at_element)[kRank], const char* name) {
  const VisibleBuffers buffers({tensor.data.readable()});
  const TensorMap map = encode_tensor_map(tensor.shape);
  expect_no_fault(name, [&] {
    run_block(64, kSharedBytes, [&](char* shared) {
      make(shared, 1);
      prefetch_tensor_map(&map);
      if (thread_idx() == 37) {
        mbarrier_arrive_expect_tx(barrier(shared), 2 * tensor.box_elements());
        tma_load(shared, &map, barrier(shared), at_element);
      }
      mbarrier_wait(barrier(shared), 0);
      const int row_elements = tensor.shape.box[0];
      for (int i = thread_idx(); i < tensor.box_elements(); i += 64) {
        int index[5] = {};
        int rest = i;
        for (int d = 0; d < kRank; ++d) {
          index[d] = at_element[d] + rest % tensor.shape.box[d];
          rest /= tensor.shape.box[d];
        }
        const int row = i / row_elements;
        const int col = i % row_elements;
        const int place =
            row * row_elements + 8 * swizzled_chunk(tensor.shape.swizzle, row, col / 8) + col % 8;
        const auto* element = reinterpret_cast<const uint16_t*>(shared) + place;
        const uint16_t found = load_shared(element);
        check(found == tensor.element(index), name, ", row ", row, ", column ", col, ": ", found,
              " instead of ", tensor.element(index));
      }
    });
  });
}

void boxes() {
  for (const auto& [swizzle, cols] : {std::pair{Swizzle::kNone, 24},
                                      {Swizzle::k32, 16},
                                      {Swizzle::k64, 32},
                                      {Swizzle::k128, 64}}) {
    Tensor three({100, 30, 5}, {cols, 16, 2}, swizzle);
    check_box(three, {8, 3, 1}, "a box inside, rank 3");
    check_box(three, {80, 20, 4}, "a box beyond each end");
    check_box(three, {-8, -3, -1}, "a box before each beginning");
    check_box(three, {-40, 20, 4}, "a box across corners");
    check_box(three, {100, 0, 0}, "a box outside");
    Tensor four({64, 3, 9, 4}, {cols, 3, 5, 1}, swizzle);
    check_box(four, {0, 0, 6, 2}, "a box of rank 4");
    Tensor five({64, 2, 9, 3, 2}, {cols, 2, 4, 1, 2}, swizzle);
    check_box(five, {0, 0, 7, 1, 0}, "a box of rank 5");
    check_box(five, {16, 1, -1, 2, 1}, "a box of rank 5 across ends");
  }
}

void elements_of_a_byte() {
  DeviceArray<uint8_t> source("source", 64 * 8 * 2);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 7 + i / 64);
  const VisibleBuffers buffers({source.readable()});
  const TensorMap map =
      encode_tensor_map({source.data(), 1, 3, {64, 8, 2}, {1, 64, 512}, {64, 8, 1}, Swizzle::k64});
  expect_no_fault("elements of a byte", [&] {
    run_warp([&](char* memory) {
      auto* bar = reinterpret_cast<Mbarrier*>(memory + 2048);
      if (thread_idx() == 0) {
        mbarrier_init(bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(bar, 512);
        tma_load(memory, &map, bar, {0, 0, 1});
      }
      sync_warp();
      mbarrier_wait(bar, 0);
      for (int i = thread_idx(); i < 512; i += 32) {
        const int row = i / 64;
        const int place = row * 64 + 16 * swizzled_chunk(Swizzle::k64, row, i % 64 / 16) + i % 16;
        const auto found = load_shared(reinterpret_cast<const uint8_t*>(memory) + place);
        check(found == source[512 + i], "byte ", i, ": ", int{found});
      }
    });
  });
}

std::string refusal(const std::function<void(TensorMapShape&)>& change) {
  Tensor tensor({64, 8, 2}, {64, 8, 1}, Swizzle::k128);
  TensorMapShape shape = tensor.shape;
  change(shape);
  try {
    encode_tensor_map(shape);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void refused_maps() {
  const auto expect = [](const char* part, const std::function<void(TensorMapShape&)>& change) {
    const std::string message = refusal(change);
    std::printf("  %s\n", message.c_str());
    check(message.find(part) != std::string::npos, "expected \"", part, "\", got \"", message,
          "\"");
  };
  check(refusal([](TensorMapShape&) {}).empty(), "the map that is changed below");
  expect("base is null", [](TensorMapShape& s) { s.base = nullptr; });
  expect("base is not aligned to 16",
         [](TensorMapShape& s) { s.base = static_cast<const char*>(s.base) + 8; });
  expect("element_bytes = 4", [](TensorMapShape& s) { s.element_bytes = 4; });
  expect("rank = 2", [](TensorMapShape& s) { s.rank = 2; });
  expect("rank = 6", [](TensorMapShape& s) { s.rank = 6; });
  expect("size[1] = 0", [](TensorMapShape& s) { s.size[1] = 0; });
  expect("stride_bytes[1] = 24", [](TensorMapShape& s) { s.stride_bytes[1] = 24; });
  expect("stride_bytes[2] = 1099511627776",
         [](TensorMapShape& s) { s.stride_bytes[2] = int64_t{1} << 40; });
  expect("box[1] = 257", [](TensorMapShape& s) { s.box[1] = 257; });
  expect("box[2] = 0", [](TensorMapShape& s) { s.box[2] = 0; });
  expect("a box row of 256 bytes with a swizzle of 128", [](TensorMapShape& s) { s.box[0] = 128; });
  expect("a box row of 64 bytes with a swizzle of 128", [](TensorMapShape& s) { s.box[0] = 32; });
  expect("a box row of 8 bytes", [](TensorMapShape& s) {
    s.swizzle = Swizzle::kNone;
    s.box[0] = 4;
  });
}

void refused_loads() {
  Tensor tensor({64, 8, 2}, {64, 8, 1}, Swizzle::k128);
  const TensorMap map = encode_tensor_map(tensor.shape);
  const auto load = [](const TensorMap* from, int byte) {
    run_warp([=](char* shared) {
      auto* bar = reinterpret_cast<Mbarrier*>(shared + 4088);
      mbarrier_init(bar, 1);
      fence_mbarrier_init();
      tma_load(shared + byte, from, bar, {0, 0, 0}, at("load"));
    });
  };
  const VisibleBuffers buffers({tensor.data.readable()});
  expect_fault("a box that is not aligned to its swizzle",
               {"tma_load at load:1: a box at shared byte 512, which is not aligned to 1024"},
               [&] { load(&map, 512); });
  expect_fault("no map", {"tma_load at load:1: no tensor map of encode_tensor_map"}, [&] {
    const TensorMap zeros{};
    load(&zeros, 0);
  });
  expect_fault("a map of another rank", {"a tensor map of rank 3 loaded as rank 4"}, [&] {
    run_warp(
        [&](char* shared) { tma_load(shared, &map, barrier(shared), {0, 0, 0, 0}, at("load")); });
  });
  expect_fault("a box beyond shared memory",
               {"tma_load at load:1: a copy outside of shared memory: byte 4096 of 4096"},
               [&] { load(&map, 4096); });
  const VisibleBuffers part(
      {{reinterpret_cast<const char*>(tensor.data.data()),
        reinterpret_cast<const char*>(tensor.data.data()) + 1000, false, "part"}});
  expect_fault("a tensor that is larger than its buffer",
               {"tma_load at load:1: a read out of bounds, nearest to part (1000 bytes)"},
               [&] { load(&map, 0); });
}

void order() {
  Tensor tensor({64, 8, 2}, {64, 8, 1}, Swizzle::k128);
  const VisibleBuffers buffers({tensor.data.readable()});
  const TensorMap map = encode_tensor_map(tensor.shape);
  const auto load = [&](char* shared, int stage) {
    mbarrier_arrive_expect_tx(barrier(shared, stage), 1024);
    tma_load(shared + 1024 * stage, &map, barrier(shared, stage), {0, 0, 0}, at("load"));
  };
  const auto read = [](char* shared, int stage) {
    return load_shared(reinterpret_cast<int*>(shared + 1024 * stage) + thread_idx(), at("read"));
  };
  expect_fault(
      "a read without a wait",
      {"load_shared at read:1: a read of shared byte", "in tma_load at load:1 was waited for"},
      [&] {
        run_block(32, kSharedBytes, [&](char* shared) {
          make(shared, 1);
          if (thread_idx() == 0) load(shared, 0);
          sync_threads();
          read(shared, 0);
        });
      });
  // The other copy ends before, or after, as the seed has it: neither helps.
  expect_fault(
      "a wait for another barrier's copy",
      {"load_shared at read:1: a read of shared byte", "in tma_load at load:1 was waited for"},
      [&] {
        run_block(32, kSharedBytes, [&](char* shared) {
          make(shared, 2);
          if (thread_idx() == 0) load(shared, 1);
          if (thread_idx() == 0) load(shared, 0);
          mbarrier_wait(barrier(shared, 0), 0);
          read(shared, 1);
        });
      });
  expect_fault(
      "a read by the thread that started the copy",
      {"load_shared at read:1: a read of shared byte", "in tma_load at load:1 was waited for"},
      [&] {
        run_block(32, kSharedBytes, [&](char* shared) {
          make(shared, 1);
          if (thread_idx() == 0) {
            load(shared, 0);
            read(shared, 0);
          }
        });
      });
  expect_fault("a store into a copy under way",
               {"store_shared at write:1: a write to shared byte", "in tma_load at load:1"}, [&] {
                 run_block(32, kSharedBytes, [&](char* shared) {
                   make(shared, 1);
                   if (thread_idx() == 0) load(shared, 0);
                   sync_threads();
                   store_shared(reinterpret_cast<int*>(shared) + thread_idx(), 1, at("write"));
                 });
               });
  expect_fault("too few bytes expected", {"deadlock", "0 of 1 arrivals pending, -24 bytes"}, [&] {
    run_block(32, kSharedBytes, [&](char* shared) {
      make(shared, 1);
      if (thread_idx() == 0) {
        mbarrier_arrive_expect_tx(barrier(shared), 1000);
        tma_load(shared, &map, barrier(shared), {0, 0, 0}, at("load"));
      }
      mbarrier_wait(barrier(shared), 0);
    });
  });
  expect_fault("too many bytes expected", {"deadlock", "0 of 1 arrivals pending, 8 bytes"}, [&] {
    run_block(32, kSharedBytes, [&](char* shared) {
      make(shared, 1);
      if (thread_idx() == 0) {
        mbarrier_arrive_expect_tx(barrier(shared), 1032);
        tma_load(shared, &map, barrier(shared), {0, 0, 0}, at("load"));
      }
      mbarrier_wait(barrier(shared), 0);
    });
  });
  expect_fault("a copy that nobody waits for",
               {"tma_load at load:1: the block ended, and nobody had waited for this copy"}, [&] {
                 run_block(32, kSharedBytes, [&](char* shared) {
                   make(shared, 1);
                   if (thread_idx() == 0) load(shared, 0);
                 });
               });
  expect_fault("a copy whose second phase nobody waits for",
               {"tma_load at load:1: the block ended, and nobody had waited for this copy"}, [&] {
                 run_block(32, kSharedBytes, [&](char* shared) {
                   make(shared, 1);
                   if (thread_idx() == 0) load(shared, 0);
                   mbarrier_wait(barrier(shared), 0);
                   sync_warp();
                   if (thread_idx() == 0) load(shared, 0);
                 });
               });
  expect_no_fault("bytes that come before they are expected, and a copier that ends early", [&] {
    run_block(64, kSharedBytes, [&](char* shared) {
      make(shared, 1);
      if (thread_idx() == 0) tma_load(shared, &map, barrier(shared), {0, 0, 0}, at("load"));
      if (warp_idx() == 0) return;
      if (thread_idx() == 32) mbarrier_arrive_expect_tx(barrier(shared), 1024);
      mbarrier_wait(barrier(shared), 0);
      read(shared, 0);
    });
  });
}

// A producer warp and two consumer warps around a ring of stages, as a kernel has it.
void pipeline() {
  Tensor tensor({64, 16, 12}, {64, 8, 1}, Swizzle::k128);
  const VisibleBuffers buffers({tensor.data.readable()});
  const TensorMap map = encode_tensor_map(tensor.shape);
  constexpr int kStages = 3;
  constexpr int kRounds = 12;
  const auto run = [&](bool consumers_arrive) {
    run_block(96, kSharedBytes, [&](char* shared) {
      const auto full = [&](int stage) { return barrier(shared, stage); };
      const auto empty = [&](int stage) { return barrier(shared, kStages + stage); };
      if (thread_idx() == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
          mbarrier_init(full(stage), 1);
          mbarrier_init(empty(stage), 2);
        }
        fence_mbarrier_init();
      }
      sync_threads();
      for (int round = 0; round < kRounds; ++round) {
        const int stage = round % kStages;
        const int parity = round / kStages % 2;
        char* mine = shared + 1024 * stage;
        if (warp_idx() == 0) {
          if (lane_idx() != 0) continue;
          if (consumers_arrive) mbarrier_wait(empty(stage), parity ^ 1);
          mbarrier_arrive_expect_tx(full(stage), 1024);
          tma_load(mine, &map, full(stage), {0, 8, round}, at("load"));
          if (!consumers_arrive) mbarrier_wait(full(stage), parity);
          continue;
        }
        mbarrier_wait(full(stage), parity);
        const auto* first = reinterpret_cast<const uint16_t*>(mine) + 8 * (lane_idx() % 8);
        const uint16_t found = load_shared(first, at("read"));
        const int index[5] = {8 * (lane_idx() % 8), 8, round};
        check(found == tensor.element(index), "round ", round, ": ", found);
        sync_warp();
        if (lane_idx() == 0) mbarrier_arrive(empty(stage));
      }
    });
  };
  expect_no_fault("a ring filled by copies", [&] { run(true); });
  expect_fault("a ring whose stages are filled too early",
               {"a race: shared byte", "load_shared at read:1", "tma_load at load:1"},
               [&] { run(false); });
}

}  // namespace

SA_SUITE(emulated_tma) {
  boxes();
  elements_of_a_byte();
  refused_maps();
  refused_loads();
  order();
  pipeline();
}

}  // namespace sink_attention::tests
