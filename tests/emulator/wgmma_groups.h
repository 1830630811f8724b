// A warpgroup's incomplete products (wgmma), and the accumulators, registers and shared memory that
// they own until the wait.
//
// A product is computed when it starts, and its sums are kept here. The accumulators hold poison
// (poison.h) until the wait for their last product, which writes the sums there.
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

// One lane's operands of a product.
struct ProductOperands {
  ElementType type;
  int n;
  bool a_mn_major;
  bool b_mn_major;
  bool accumulate;
  uint64_t a_descriptor;  // if a is nullptr
  uint64_t b_descriptor;
  const uint32_t* a;  // 4 registers
  float* acc;         // [n / 8][4]
};

// The latest registers that a thread packed since its last warpgroup_arrive.
struct PackLog {
  static constexpr int kSize = 64;
  uint32_t values[kSize];
  uint32_t count = 0;
  void add(uint32_t value) { values[count++ % kSize] = value; }
  bool has(uint32_t value) const;
};

// One lane calls each function once for the whole warpgroup, except the last two.
class WarpgroupProducts {
 public:
  void clear();  // a new block
  void fence();
  void start(void* const* lanes);  // of ProductOperands
  void commit();
  void wait(int pending);
  // The oldest incomplete product; nullptr without one.
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
  std::vector<Range> unfenced_;  // lane 0's accumulators that a wait released since the last fence
  std::vector<PackLog> logs_;
};

struct Warpgroup {
  int arrived = 0;  // the number of lanes at the instruction
  Thread* first = nullptr;
  WarpgroupProducts products;

  void start() {  // a new block
    arrived = 0;
    products.clear();
  }
};

// At the end of a thread: an incomplete product is a fault.
void check_end_of_products();

}  // namespace emulator
