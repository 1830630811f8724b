// A scenario's backward params, with the memory that they point to.
#pragma once

#include <vector>

#include "scenario.h"

namespace sink_attention::tests {

// Contiguous gradients [rows][heads][dim], NaN until written.
struct Gradients {
  Array dout, dlse, dq, dk, dv, ds_aux;
  attention::FlashBwdParams params{};
};

// with_dlse: a gradient through lse too.
Gradients make_gradients(const Scenario& s, bool with_dlse, unsigned seed);

// The forward's results by the definition, rounded to their dtypes.
void set_reference_results(Scenario& s);

std::vector<double> values_of(const Array& array);

}  // namespace sink_attention::tests
