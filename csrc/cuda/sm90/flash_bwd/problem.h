// What a backward kernel is given beside the problem itself, and its entries, one for each head_dim
// class; hdim*.cu hold one each.
#pragma once

#include "attention/problem.h"
#include "cuda/common/bwd_workspace.h"
#include "primitives/tma.h"

namespace sink_attention::cuda::sm90 {

struct FlashBwdKernelProblem {
  attention::FlashBwdProblem bwd;
  BwdWorkspace workspace;
  // Of the head_dim class's boxes (tensor_maps.h); where has_..._map is false there is none.
  primitives::TensorMap q_map;
  primitives::TensorMap dout_map;
  primitives::TensorMap k_map;
  primitives::TensorMap v_map;
  bool has_q_map;
  bool has_dout_map;
  bool has_k_map;
  bool has_v_map;
  int group;           // num_heads_q / num_heads_kv
  int num_key_blocks;  // of the longest sequence
  // The order of thread blocks. All (sequence, kv head) pairs, heads fastest, are cut into sections
  // of section_pairs; the last has what is left too. Sections follow each other; in each, the first
  // blocks of keys of all its pairs come first, then all second ones, ... Under a causal mask the
  // first ones see the most queries: started last they would work on alone. All pairs in one
  // section would be the best for that, but blocks at work at one time shall find Q, dO and dQ in
  // L2, which those of one pair take tile by tile together.
  int section_pairs;
  int num_sections;
  // A score becomes a logit in base 2 by to_log2; with a softcap it is first tanh(score * to_tanh),
  // and to_log2 is then of the cap.
  float to_log2;
  float to_tanh;
  bool capped;
};

using Stream = void*;

void flash_bwd_hdim64(const FlashBwdKernelProblem& problem, Stream stream);
void flash_bwd_hdim96(const FlashBwdKernelProblem& problem, Stream stream);
void flash_bwd_hdim128(const FlashBwdKernelProblem& problem, Stream stream);
void flash_bwd_hdim192(const FlashBwdKernelProblem& problem, Stream stream);
void flash_bwd_hdim192_128(const FlashBwdKernelProblem& problem, Stream stream);
void flash_bwd_hdim256(const FlashBwdKernelProblem& problem, Stream stream);

}  // namespace sink_attention::cuda::sm90
