// The forward kernel's parameters.
#pragma once

#include "attention/fp8_params.h"
#include "cuda/device/score_scale.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct FlashFwdKernelParams {
  primitives::TensorMap q_map;  // each map is set where ..._uses_tma is true
  primitives::TensorMap k_map;
  primitives::TensorMap v_map;
  attention::FlashFwdParams attn;
  attention::Descale q_descale;  // this and the next two: of float8 only
  attention::Descale k_descale;
  attention::Descale v_descale;
  ScoreScale scale;
  bool q_uses_tma;
  bool k_uses_tma;
  bool v_uses_tma;
  bool out_is_vectorised;
  int out_cols;         // head_dim_v
  int box_rows;         // keys of a TMA box
  int qhead_per_khead;  // num_heads_q / num_heads_kv
  int num_tiles;        // tiles of kBlockM rows, of the longest sequence and one kv head
  int num_work_tiles;   // num_tiles * batch * num_heads_kv
  int section;          // (sequence, kv head) pairs of a section (work_tile.cuh)
};

using Stream = void*;

// num_sms: thread blocks that run at once.
void flash_fwd_hdim64(const attention::FlashFwdParams& params, int num_sms, Stream stream);
void flash_fwd_hdim96(const attention::FlashFwdParams& params, int num_sms, Stream stream);
void flash_fwd_hdim128(const attention::FlashFwdParams& params, int num_sms, Stream stream);
void flash_fwd_hdim192(const attention::FlashFwdParams& params, int num_sms, Stream stream);
void flash_fwd_hdim192_128(const attention::FlashFwdParams& params, int num_sms, Stream stream);
void flash_fwd_hdim256(const attention::FlashFwdParams& params, int num_sms, Stream stream);

}  // namespace sink_attention::cuda::sm90
