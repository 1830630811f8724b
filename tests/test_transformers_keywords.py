"""What models pass to attention by keyword is used, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gpt_oss, logits, max_diff, tokens
from torch import Tensor, nn

from sink_attention_ext import PagedKVCache
from sink_attention_ext.integrations import keywords
from sink_attention_ext.integrations.kvcache import kvcache_sink_attention
from sink_attention_ext.integrations.paged import paged_sink_attention
from sink_attention_ext.integrations.transformers import sink_attention

HEADS = 4
SINKS = torch.tensor([20.0, -20.0, 1.5, -1.5])  # far from 0, so that a dropped one shows


def layer() -> nn.Module:
    module = nn.Module()
    vars(module).update(layer_idx=0, is_causal=True)
    return module


def qkv(length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, 8, generator=generator) for heads in (HEADS, 2, 2)]


class OneGroup:
    """What paged_sink_attention reads of transformers' PagedAttentionCache: one full layer."""

    sliding_windows = (1,)
    layer_index_to_group_indices = ((0, 0),)
    sentinel_index = -1

    def __init__(self) -> None:
        self.key_cache, self.value_cache = [torch.zeros(8, 2, 8)], [torch.zeros(8, 2, 8)]


def plain(**options: Any) -> Tensor:
    return sink_attention(layer(), *qkv(), None, **options)[0][0]


def paged(**options: Any) -> Tensor:
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    return paged_sink_attention(
        layer(),
        *qkv(),
        cache=OneGroup(),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_seqlen_q=6,
        max_seqlen_k=6,
        read_index=[torch.zeros(0, dtype=torch.long)],
        write_index=[torch.arange(6)],
        **options,
    )[0]


def kvcache(**options: Any) -> Tensor:
    cache = PagedKVCache(
        [(-1, 0)], num_heads_kv=2, head_dim=8, num_pages=4, page_size=4, max_num_seqs=1,
        max_seqlen=8, max_num_batched_tokens=8, dtype=torch.float32,
    )  # fmt: skip
    step = cache.append([cache.allocate()], [6])
    return kvcache_sink_attention(layer(), *qkv(), cache_step=step, **options)[0][0]


FUNCTIONS = pytest.mark.parametrize("function", [plain, paged, kvcache])
Function = Callable[..., Tensor]


@FUNCTIONS
def test_sinks_is_another_name_of_s_aux(function: Function) -> None:
    expected = function(s_aux=SINKS)
    assert torch.equal(function(sinks=SINKS), expected)
    assert max_diff(function(), expected) > 0.1


@FUNCTIONS
@pytest.mark.parametrize(
    "shape", [(1, HEADS, 6, 1), (6, HEADS), (1, HEADS, 1, 1), ()], ids=lambda shape: str(shape)
)
def test_sinks_per_token_are_refused(function: Function, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sinks must be \(num_heads,\); Module 0 passes .*eager"):
        function(sinks=torch.zeros(shape))


@FUNCTIONS
def test_sinks_of_other_kinds_are_refused(function: Function) -> None:
    with pytest.raises(ValueError, match="passes s_aux and sinks: only one"):
        function(s_aux=SINKS, sinks=SINKS)
    with pytest.raises(TypeError, match="sinks must be a tensor; got float"):
        function(sinks=0.0)
    with pytest.raises(ValueError, match="has 5 logits, q has 4 heads in Module 0"):
        function(sinks=torch.zeros(HEADS + 1))


def test_gradients_reach_sinks() -> None:
    ours, expected = SINKS.clone().requires_grad_(), SINKS.clone().requires_grad_()
    plain(sinks=ours).square().sum().backward()
    plain(s_aux=expected).square().sum().backward()
    assert torch.equal(ours.grad, expected.grad) and ours.grad[2] != 0


@FUNCTIONS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a_keyword_of_tomorrow", torch.zeros(1)),
        ("a_keyword_of_tomorrow", 0),
        ("a_keyword_of_tomorrow", False),
        ("sink", SINKS),
        ("learnable_sink", SINKS),
        ("attention_sinks", SINKS),
        ("alibi_slopes", SINKS),
        ("window_size", (3, 0)),
        ("score_mod", abs),
        ("block_mask", object()),
        ("key_padding_mask", torch.ones(1, 6)),
        ("logits_soft_cap", 5.0),
        ("k_scale", 2.0),
    ],
)
def test_an_unknown_keyword_is_refused(function: Function, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"sink_attention does not know {name}, which Module 0"):
        function(**{name: value})


@FUNCTIONS
@pytest.mark.parametrize("name", keywords.UNSUPPORTED)
def test_a_known_keyword_that_is_not_computed_is_refused(function: Function, name: str) -> None:
    with pytest.raises(ValueError, match=f"does not compute {name}, which Module 0 .*eager"):
        function(**{name: torch.zeros(1)})


@FUNCTIONS
def test_harmless_keywords_change_nothing(function: Function) -> None:
    expected = function(s_aux=SINKS)
    harmless = {name: object() for name in keywords.HARMLESS}
    if function is paged:
        del harmless["cache"]  # there it is the cache
    none = dict.fromkeys((*keywords.UNSUPPORTED, "a_keyword_of_tomorrow", "sinks"))
    ours = function(s_aux=SINKS, output_attentions=False, **none, **harmless)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("function", [paged, kvcache])
def test_paged_functions_are_causal(function: Function) -> None:
    expected = function()
    assert torch.equal(function(is_causal=True, position_ids=torch.arange(6)[None]), expected)
    with pytest.raises(ValueError, match="is causal; Module 0 has is_causal=False"):
        function(is_causal=False)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"])
def test_bounds_beside_a_cache_step_are_refused(name: str) -> None:
    """cache_step says which tokens are whose; bounds would be passed over."""
    with pytest.raises(ValueError, match=f"does not know {name}"):
        kvcache(**{name: torch.tensor([0, 6])})


def test_a_keyword_that_the_user_gives_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches every layer; the user may say that it is harmless."""
    model, ids = gpt_oss(num_hidden_layers=2), tokens(1, 20)
    with pytest.raises(ValueError, match="does not know my_flag, which GptOssAttention 0 passes"):
        logits(model, ids, my_flag=1)
    monkeypatch.setattr(keywords, "HARMLESS", keywords.HARMLESS | {"my_flag"})
    assert torch.equal(logits(model, ids, my_flag=1), logits(model, ids))


def test_an_unknown_keyword_is_refused_under_compile() -> None:
    model, ids = gpt_oss(num_hidden_layers=2), tokens(1, 20)
    model.set_experts_implementation("batched_mm")

    def step(ids: Tensor, **options: Any) -> Tensor:
        return model(ids, use_cache=False, **options).logits

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(ids, output_router_logits=False, num_items_in_batch=3)
        assert max_diff(ours, step(ids)) < 1e-5
        with pytest.raises(Exception, match="does not know a_keyword_of_tomorrow"):
            compiled(ids, a_keyword_of_tomorrow=1)
    torch._dynamo.reset()
