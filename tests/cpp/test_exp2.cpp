// The softmax's exponentials, of every instruction set. All sets have the same polynomials, so that
// of AVX-512 BF16 is tested on any machine.
#include <cmath>

#define SA_ISA isa_test
#include "check.h"
#include "cpu/simd/math.h"

namespace sink_attention::tests {
namespace {

using namespace cpu::isa_test;

struct Errors {
  double largest = 0;
  double mean = 0;
};

// Over arguments of one octave.
template <class Exp2>
Errors relative_errors(const Exp2& exp2_of) {
  constexpr int kSteps = 1 << 16;
  Errors errors;
  for (int i = 0; i < kSteps; ++i) {
    const float x = -1.0f + (static_cast<float>(i) + 0.5f) / kSteps;
    const double error = exp2_of(broadcast(x))[0] / std::exp2(static_cast<double>(x)) - 1;
    errors.largest = std::fmax(errors.largest, std::fabs(error));
    errors.mean += error / kSteps;
  }
  return errors;
}

template <class Exp2>
void check_exp2(const char* name, double most, double most_mean, const Exp2& exp2_of) {
  const Errors errors = relative_errors(exp2_of);
  check(errors.largest < most, name, ": an error of ", errors.largest);
  check(std::fabs(errors.mean) < most_mean, name, ": a mean error of ", errors.mean);
  for (int n = -126; n <= 0; ++n) {
    const float power = exp2_of(broadcast(static_cast<float>(n)))[0];
    check(power == std::ldexp(1.0f, n), name, ": 2^", n, " is ", power);
  }
  check(exp2_of(broadcast(-INFINITY))[0] == 0, name, ": 2^-inf is not 0");
  check(std::isnan(exp2_of(broadcast(NAN))[0]), name, ": 2^NaN is not NaN");
}

}  // namespace

SA_SUITE(exp2) {
  check_exp2("float32", 2.5e-7, 2e-8, [](Vec<float> x) { return exp2(x); });
  check_exp2("bfloat16 P", 3.6e-6, 2e-8, [](Vec<float> x) { return exp2_by(kExp2Fast, x); });
}

}  // namespace sink_attention::tests
