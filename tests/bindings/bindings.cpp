// The torch-free C++ that decides what runs, and what a query sees, for tests in Python: plans and
// the kernel table, masks and blocks of keys. Test equipment: `python setup.py build_bindings`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/block_list.h"
#include "attention/mask.h"
#include "cpu/backend.h"
#include "cpu/instruction_set.h"
#include "cuda/registry.h"

namespace py = pybind11;
namespace attention = sink_attention::attention;
namespace cuda = sink_attention::cuda;

namespace {

using attention::DataType;

template <class Params>
py::dict dict_of(const cuda::Plan<Params>& plan) {
  py::dict result;
  result["kernel"] = plan.kernel_name();
  if (plan.takes_call()) {
    result["tile_rows"] = plan.row->bucket.tile_rows;
    result["tile_keys"] = plan.row->bucket.tile_keys;
  }
  result["num_splits"] = plan.num_splits;
  result["workspace_bytes"] = plan.workspace_bytes;
  py::list why_not;  // by table
  for (const char* reason : plan.why_not) {
    if (reason != nullptr) why_not.append(reason);
  }
  result["why_not"] = why_not;
  return result;
}

// op: "flash_fwd", "flash_fwd_fp8" or "flash_bwd". forced: "", "sm80" or "sm90". build_archs: as
// TORCH_CUDA_ARCH_LIST has them, None: any.
py::dict plan(const std::string& op, const cuda::CallShape& shape, int arch, int num_sms,
              const std::string& forced, const std::optional<std::string>& build_archs) {
  cuda::Device device{num_sms, arch, cuda::forceable_family(forced)};
  device.build_archs = build_archs ? build_archs->c_str() : nullptr;
  if (op == "flash_bwd") return dict_of(cuda::plan_flash_bwd(shape, device));
  if (op == "flash_fwd_fp8") return dict_of(cuda::plan_flash_fwd_fp8(shape, device));
  return dict_of(cuda::plan_flash_fwd(shape, device));
}

template <class Params>
void append_rows(const cuda::Tables<Params>& tables, py::list& rows) {
  for (const cuda::KernelTable<Params>* table : tables) {
    for (const cuda::KernelRow<Params>& row : table->rows) {
      py::dict entry;
      entry["name"] = cuda::name_of(*table, row);
      entry["op"] = table->op;
      entry["family"] = table->family;
      entry["head_dim"] = row.bucket.head_dim;
      entry["head_dim_v"] = row.bucket.head_dim_v;
      entry["tile_rows"] = row.bucket.tile_rows;
      entry["tile_keys"] = row.bucket.tile_keys;
      entry["least_arch"] = table->least_arch;
      entry["greatest_arch"] = table->greatest_arch;
      rows.append(entry);
    }
  }
}

py::list kernel_table() {
  py::list rows;
  append_rows(cuda::flash_fwd_tables(), rows);
  append_rows(cuda::flash_fwd_fp8_tables(), rows);
  append_rows(cuda::flash_bwd_tables(), rows);
  return rows;
}

// How the CPU's kernels cut a forward: (query positions of a tile, keys of a block).
std::pair<int64_t, int64_t> cpu_tile(const cuda::CallShape& shape, const std::string& isa) {
  sink_attention::cpu::set_instruction_set(isa);
  attention::FlashFwdParams params{};
  params.dtype = shape.dtype;
  params.kv_dtype = shape.kv_dtype;
  params.batch = shape.batch;
  params.seqlen_q = shape.seqlen_q;
  params.seqlen_k = shape.seqlen_k;
  params.num_heads_q = shape.num_heads_q;
  params.num_heads_kv = shape.num_heads_kv;
  params.head_dim = shape.head_dim;
  params.head_dim_v = shape.head_dim_v;
  const auto& kernels = sink_attention::cpu::kernels_for(params.dtype, params.kv_dtype);
  const sink_attention::cpu::FwdPlan plan = kernels.plan_fwd(params);
  return {plan.tile_positions, plan.block_keys};
}

// A mask with its tree.
struct OwnedMask {
  std::vector<int64_t> tree;
  attention::Mask mask;
};

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.attr("MAX_HEAD_DIM") = attention::kMaxHeadDim;

  py::enum_<DataType>(m, "DataType")
      .value("float64", DataType::kFloat64)
      .value("float32", DataType::kFloat32)
      .value("float16", DataType::kFloat16)
      .value("bfloat16", DataType::kBFloat16)
      .value("float8_e4m3fn", DataType::kFloat8E4M3)
      .value("int8", DataType::kInt8);
  py::class_<cuda::RowLayout>(m, "RowLayout")
      .def(py::init([](bool is_aligned, int64_t batch, int64_t row, int64_t head) {
        return cuda::RowLayout{is_aligned, batch, row, head};
      }))
      .def_readwrite("is_aligned", &cuda::RowLayout::is_aligned);
  using cuda::CallShape;
  py::class_<CallShape>(m, "CallShape")
      .def(py::init<>())
      .def_readwrite("dtype", &CallShape::dtype)
      .def_readwrite("kv_dtype", &CallShape::kv_dtype)
      .def_readwrite("is_paged", &CallShape::is_paged)
      .def_readwrite("is_packed_q", &CallShape::is_packed_q)
      .def_readwrite("is_packed_k", &CallShape::is_packed_k)
      .def_readwrite("has_tree_mask", &CallShape::has_tree_mask)
      .def_readwrite("has_sink", &CallShape::has_sink)
      .def_readwrite("deterministic", &CallShape::deterministic)
      .def_readwrite("batch", &CallShape::batch)
      .def_readwrite("seqlen_q", &CallShape::seqlen_q)
      .def_readwrite("seqlen_k", &CallShape::seqlen_k)
      .def_readwrite("total_q", &CallShape::total_q)
      .def_readwrite("total_k", &CallShape::total_k)
      .def_readwrite("num_heads_q", &CallShape::num_heads_q)
      .def_readwrite("num_heads_kv", &CallShape::num_heads_kv)
      .def_readwrite("head_dim", &CallShape::head_dim)
      .def_readwrite("head_dim_v", &CallShape::head_dim_v)
      .def_readwrite("page_size", &CallShape::page_size)
      .def_readwrite("num_pages", &CallShape::num_pages)
      .def_readwrite("window_left", &CallShape::window_left)
      .def_readwrite("window_right", &CallShape::window_right)
      .def_readwrite("num_sink_tokens", &CallShape::num_sink_tokens)
      .def_readwrite("num_splits", &CallShape::num_splits)
      .def_readwrite("q", &CallShape::q)
      .def_readwrite("k", &CallShape::k)
      .def_readwrite("v", &CallShape::v)
      .def_readwrite("out", &CallShape::out)
      .def_readwrite("dout", &CallShape::dout)
      .def_readwrite("dk", &CallShape::dk)
      .def_readwrite("dv", &CallShape::dv);
  m.def("plan", &plan, py::arg("op"), py::arg("shape"), py::arg("arch"), py::arg("num_sms") = 132,
        py::arg("forced") = "", py::arg("build_archs") = std::nullopt);
  m.def("kernel_table", &kernel_table);
  m.def("cpu_tile", &cpu_tile, py::arg("shape"), py::arg("isa") = "portable");

  const auto pair_of = [](attention::Range range) { return std::pair(range.begin, range.end); };
  py::class_<OwnedMask>(m, "Mask")
      .def(py::init([](int64_t seqlen_q, int64_t seqlen_k, int64_t window_left,
                       int64_t window_right, int64_t num_sink_tokens, std::vector<int64_t> tree) {
             auto owned = std::make_unique<OwnedMask>();
             owned->tree = std::move(tree);
             owned->mask = {seqlen_q,
                            seqlen_k,
                            window_left,
                            window_right,
                            attention::min_of(num_sink_tokens, seqlen_k),
                            owned->tree.empty() ? nullptr : owned->tree.data()};
             return owned;
           }),
           py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("window_left") = -1,
           py::arg("window_right") = -1, py::arg("num_sink_tokens") = 0,
           py::arg("tree") = std::vector<int64_t>{})
      .def("is_visible",
           [](const OwnedMask& m, int64_t q, int64_t k) { return m.mask.is_visible(q, k); })
      .def("visible_keys",
           [](const OwnedMask& m, int64_t begin, int64_t end) {
             const attention::KeySet keys = m.mask.visible_keys(begin, end);
             return std::tuple(keys.sink_end, keys.window.begin, keys.window.end);
           })
      .def("keys_seen_by_all",
           [pair_of](const OwnedMask& m, int64_t begin, int64_t end) {
             return pair_of(m.mask.keys_seen_by_all(begin, end));
           })
      .def("visible_queries",
           [pair_of](const OwnedMask& m, int64_t begin, int64_t end) {
             return pair_of(m.mask.visible_queries(begin, end));
           })
      // The blocks of block_keys keys that queries [begin, end) visit, in their order.
      .def("blocks", [](const OwnedMask& m, int64_t begin, int64_t end, int64_t block_keys) {
        const auto list = attention::blocks_of(m.mask.visible_keys(begin, end), block_keys);
        std::vector<int64_t> blocks;
        for (int64_t i = 0; i < list.count(); ++i) blocks.push_back(list.block(i));
        return blocks;
      });
}
