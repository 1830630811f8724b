// A warpgroup's products (wgmma) that are under way: which accumulators, registers and shared
// memory are theirs until they are waited for.
//
// A product is computed when it starts. Its sums are kept here, and the accumulators hold poison
// (poison.h) until the wait that ends the last product into them writes the sums there.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/step.h"
#include "emulator/wgmma_operands.h"

namespace emulator {

struct Thread;

// What one lane brings to a product.
struct ProductOperands {
  ElementType type;
  int n;
  bool a_mn_major;
  bool b_mn_major;
  bool accumulate;
  uint64_t a_descriptor;  // where a is nullptr
  uint64_t b_descriptor;
  const uint32_t* a;  // 4 registers
  float* acc;         // [n / 8][4]
};

// The registers that a thread packed since its last warpgroup_arrive, the latest of them.
struct PackLog {
  static constexpr int kSize = 64;
  uint32_t values[kSize];
  uint32_t count = 0;
  void add(uint32_t value) { values[count++ % kSize] = value; }
  bool has(uint32_t value) const;
};

// Each but the last two is called once for all lanes of the warpgroup, by one of them.
class WarpgroupProducts {
 public:
  void clear();  // a new block
  void fence();
  void start(void* const* lanes);  // of ProductOperands
  void commit();
  void wait(int pending);
  // The oldest product under way; nullptr without one.
  const Step* under_way() const;
  // Whether a product of that step is in no group yet.
  bool is_uncommitted(uint16_t step) const;

 private:
  struct Accumulation {
    ElementType type;
    int n;
    float* lanes[kWarpgroupThreads];
    std::vector<float> sums;  // [64][n]
    uint32_t poison;
    Step first;  // the product that began it
    int products = 0;
  };
  struct RegisterOperand {
    const uint32_t* lanes[kWarpgroupThreads];
    uint32_t values[kWarpgroupThreads][4];
  };
  struct Product {
    Step step;
    Accumulation* accumulation;
    std::unique_ptr<RegisterOperand> a;
    std::vector<ByteRange> shared;
  };
  struct Range {
    const float* begin;
    const float* end;
    Step step;
  };

  Accumulation& accumulation_for(void* const* lanes);
  void check_lanes_agree(void* const* lanes) const;
  void check_accumulators_fenced(const ProductOperands& first) const;
  void check_operand_fenced(void* const* lanes) const;
  void finish(const Product& product);
  void give_back(const Accumulation& accumulation);

  std::vector<std::unique_ptr<Accumulation>> accumulations_;
  std::deque<Product> products_;  // oldest first
  std::deque<int> groups_;        // sizes of the committed groups, oldest first
  int open_ = 0;                  // products in no group
  bool was_fenced_ = false;
  std::vector<Range>
      unfenced_;  // accumulators of lane 0 that a wait gave back since the last fence
  std::vector<PackLog> logs_;
};

struct Warpgroup {
  int arrived = 0;  // lanes at an instruction
  Thread* first = nullptr;
  WarpgroupProducts products;

  void start() {  // a new block
    arrived = 0;
    products.clear();
  }
};

// At the end of a thread: a product under way is a fault.
void check_end_of_products();

}  // namespace emulator
