// What a forward kernel is given beside the problem itself.
#pragma once

#include "attention/fp8_params.h"
#include "cuda/device/score_scale.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct FlashFwdKernelParams {
  primitives::TensorMap q_map;  // meaningless where ..._in_boxes is false
  primitives::TensorMap k_map;
  primitives::TensorMap v_map;
  attention::FlashFwdParams attn;
  attention::Descale q_descale;  // of float8, like the next two; not read with other types
  attention::Descale k_descale;
  attention::Descale v_descale;
  ScoreScale scale;
  bool q_uses_tma;
  bool k_uses_tma;
  bool v_uses_tma;
  bool out_is_vectorised;
  int out_cols;         // head_dim_v
  int box_rows;         // keys of a box
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  int num_tiles;        // of rows, of the longest sequence and one kv head
  int num_works;        // num_tiles * batch * num_heads_kv
  int section;          // sequences' kv heads whose tiles are worked on before those of others
};

}  // namespace sink_attention::cuda::sm90
