"""torch's own context_parallel around these functions is refused by name, and ours works in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import experimental
from torch.distributed.tensor.experimental import _attention

from sink_attention_ext import (
    PagedKVCache,
    cascade_attn_with_kvcache,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from sink_attention_ext.parallel import context_parallel_attn_func

NAMED = r"context_parallel.*sink_attention_ext\.parallel\.context_parallel_attn_func"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def attend_in_a_cache(q: Tensor) -> Tensor:
    cache = PagedKVCache(
        [(-1, 0)], num_heads_kv=2, head_dim=8, num_pages=4, max_num_seqs=2, max_seqlen=16,
        max_num_batched_tokens=8, dtype=torch.float32,
    )  # fmt: skip
    for pages in (cache.k_cache(0), cache.v_cache(0)):
        pages.zero_()
    step = cache.append([cache.allocate()], [4])
    try:
        return step.attend(0, q[0], q[0], q[0])
    finally:
        assert not cache.k_cache(0).any() or not _is_on(), "a refused call has written"


def _is_on() -> bool:
    return not isinstance(
        torch.nn.functional.scaled_dot_product_attention, type(torch.sin)
    ) or torch.ops.aten._scaled_dot_product_flash_attention.default in (
        torch.distributed.tensor.DTensor._op_dispatcher._custom_op_handlers
    )


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "dense": lambda q: flash_attn_func(q, q, q, causal=True),
    "varlen": lambda q: flash_attn_varlen_func(q[0], q[0], q[0], int32(0, 4), int32(0, 4), 4, 4),
    "kvcache": lambda q: flash_attn_with_kvcache(q, q, q),
    "cascade": lambda q: cascade_attn_with_kvcache(q[:, :1], q, q, int32(3), int32([0]), 0),
    "attend": attend_in_a_cache,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused_within_and_accepted_before_and_after(name: str, mesh: DeviceMesh) -> None:
    function, q = FUNCTIONS[name], torch.randn(1, 4, 2, 8)
    before = function(q)
    row = q.clone()
    with experimental.context_parallel(mesh, buffers=[row], buffer_seq_dims=[1]):
        with pytest.raises(RuntimeError, match=NAMED):
            function(q)
    assert torch.equal(function(q), before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused_while_the_dispatcher_of_wrapped_modules_is_on(name: str) -> None:
    function, q = FUNCTIONS[name], torch.randn(1, 4, 2, 8)
    _attention._enable_context_parallel_dispatcher()
    try:
        with pytest.raises(RuntimeError, match=NAMED):
            function(q)
    finally:
        _attention._disable_context_parallel_dispatcher()
    function(q)


@pytest.mark.parametrize("compiled_before", [False, True])
def test_refused_under_torch_compile(compiled_before: bool, mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    call = torch.compile(FUNCTIONS["dense"], backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 4, 2, 8)
    if compiled_before:
        call(q)
    with experimental.context_parallel(mesh, buffers=[q.clone()], buffer_seq_dims=[1]):
        with pytest.raises(Exception, match=NAMED):
            call(q)
    call(q)


def test_ours_works_within_it(mesh: DeviceMesh) -> None:
    q = torch.randn(1, 4, 2, 8)
    expected = flash_attn_func(q, q, q, causal=True)
    with experimental.context_parallel(mesh, buffers=[q.clone()], buffer_seq_dims=[1]):
        out = context_parallel_attn_func(q, q, q, causal=True)
    torch.testing.assert_close(out, expected)


def test_a_replaced_sdpa_of_somebody_else_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: None
    )
    FUNCTIONS["dense"](torch.randn(1, 4, 2, 8))


def test_looking_for_it_imports_nothing() -> None:
    code = (
        "import sys, torch, sink_attention_ext as s\n"
        "before = {m for m in sys.modules if m.startswith('torch.distributed.tensor')}\n"
        "q = torch.randn(1, 4, 2, 8); s.flash_attn_func(q, q, q)\n"
        "after = {m for m in sys.modules if m.startswith('torch.distributed.tensor')}\n"
        "assert before == after, after - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
