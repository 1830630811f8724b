// The CPU's fill_unused_rows.
#include "cpu/backend.h"
#include "unused_rows_case.h"

namespace sink_attention::tests {

SA_SUITE(unused_rows) {
  check_unused_rows("cpu", [](UnusedRows&, const auto& params) { cpu::fill_unused_rows(params); });
}

}  // namespace sink_attention::tests
