"""Models that handle the mask themselves: an error that says so and names eager attention."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import gpt_oss, tokens

from sink_attention_ext.integrations.mask_function import sink_attention_mask
from sink_attention_ext.integrations.mask_object import AttentionMask
from sink_attention_ext.integrations.transformers import sink_attention

SIZE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "pad_token_id": 0,
}
SINKS = SIZE | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
MPT = {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 8}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("hy_v4", SINKS, "handles attention_mask as a tensor .*__getitem__"),
        ("deepseek_v4", SINKS, "made for 40 queries and 40 keys; .* DeepseekV4Attention: a layer"),
        ("bloom", SIZE, "handles attention_mask as a tensor .*__radd__"),
        ("mpt", MPT, "handles attention_mask as a tensor .*attention_mask"),
    ],
)
def test_a_model_that_handles_masks_itself(
    name: str, sizes: dict[str, int], why: str, padded: bool
) -> None:
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sink_attention"
    ).eval()
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, : 5 if padded else 0] = 0
    with pytest.raises((TypeError, ValueError), match=why) as caught:
        model(tokens(1, 40), attention_mask=mask)
    assert "sink_attention" in str(caught.value) and "'eager'" in str(caught.value)


def masks() -> dict[str, AttentionMask]:
    causal = transformers.masking_utils.causal_mask_function
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    packing = transformers.masking_utils.packed_sequence_mask_function(torch.arange(4)[None] // 2)
    holes = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]]).bool()
    packed = transformers.masking_utils.and_masks(causal, packing)
    given = [(causal, None), (causal, padding), (causal, holes), (packed, None)]
    made = [sink_attention_mask(2, 4, 4, mask_function=f, attention_mask=m) for f, m in given]
    return {type(mask).__name__: mask for mask in made}


MASKS = masks()
X = torch.ones(2, 1, 4, 4)
USES: dict[str, Callable[[Any], Any]] = {
    "slice": lambda mask: mask[:, :, :, :3],
    "assignment": lambda mask: operator.setitem(mask, 0, 1),
    "tensor + mask": lambda mask: X + mask,
    "mask + tensor": lambda mask: mask + X,
    "sum": lambda mask: sum([X, mask]),
    "1 - mask": lambda mask: 1.0 - mask,
    "mask * tensor": lambda mask: mask * X,
    "~mask": lambda mask: ~mask,
    "mask & tensor": lambda mask: mask & X,
    "mask == 0": lambda mask: mask == 0,
    "mask < 0": lambda mask: mask < 0,
    "len": len,
    "list": list,
    "masked_fill": lambda mask: X.masked_fill(mask, 0.0),
    "where": lambda mask: torch.where(mask, X, X),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "pad": lambda mask: torch.nn.functional.pad(mask, (0, 1)),
    "attribute": lambda mask: mask.shape[-1],
    "cast": lambda mask: mask.to(torch.bool),
    "cast by keyword": lambda mask: mask.to(dtype=torch.bool),
    "method": lambda mask: mask.unsqueeze(1),
    "SDPA": lambda mask: torch.nn.functional.scaled_dot_product_attention(X, X, X, mask),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("use", USES)
def test_a_mask_object_is_no_tensor(use: str, kind: str) -> None:
    with pytest.raises(TypeError, match=f"as a tensor .* {kind}, .*eager'"):
        USES[use](MASKS[kind])


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_object_is_an_object(kind: str) -> None:
    mask = MASKS[kind]
    assert not hasattr(mask, "shape") and getattr(mask, "dtype", None) is None
    assert mask and mask is not None and hash(mask) == hash(mask) and mask in {mask: 0}
    assert vars(copy.deepcopy(mask)).keys() == vars(mask).keys()
    assert mask.to("meta").q_length == 4


@pytest.mark.parametrize("shape", [(2, 20, 20), (40,), (2, 1, 1, 20, 20)], ids=str)
def test_masks_of_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    model = gpt_oss(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"takes an attention_mask of \(batch, tokens\).*; got"):
        model(tokens(2, 20), attention_mask=torch.ones(shape, dtype=torch.long))
    q, k, v = (torch.ones(2, heads, 20, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="have 4 dimensions; got shape"):
        sink_attention(torch.nn.Module(), q, k, v, torch.ones(shape))


def test_a_mask_of_another_batch_is_refused() -> None:
    model = gpt_oss(num_hidden_layers=2)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attention_mask must have a row for each of 2 sequences"):
        model(tokens(2, 20), attention_mask=mask)
