"""The folder for LOCAL_KERNELS: its files, FlashAttention-3's signatures, and what is refused."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import Backend

import sink_attention_ext
from sink_attention_ext import __main__ as command
from sink_attention_ext import hub_kernel
from sink_attention_ext.integrations import flash_attention_3 as fa3

ROOT = Path(__file__).resolve().parent.parent
SINKS = torch.linspace(-2, 2, 8)


def qkv(*sizes: int, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    """q with 8 heads, k and v with 2, head_dim 16: (*sizes, heads, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*sizes, heads, 16, generator=generator).to(device) for heads in (8, 2, 2)]


def lengths(*values: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# ---- the folder ----


def test_metadata_is_what_the_kernels_package_reads() -> None:
    kernels_data = pytest.importorskip("kernels_data")
    metadata = kernels_data.Metadata.read_from_file(fa3.KERNEL_FOLDER / "metadata.json")
    assert metadata.version == 1
    assert metadata.python_depends == []
    assert metadata.name.python_name == sink_attention_ext.__name__
    assert metadata.id != sink_attention_ext.__name__  # under its id the folder enters sys.modules


def test_the_command_prints_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernel-path"]) == 0
    path = Path(capsys.readouterr().out.removesuffix("\n"))
    assert path == Path(hub_kernel.__file__).parent == fa3.KERNEL_FOLDER
    assert fa3.local_kernels() == f"kernels-community/vllm-flash-attn3={path}"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["kernel"])
    assert "choose from" in capsys.readouterr().err


def test_a_folder_that_the_variable_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fa3, "KERNEL_FOLDER", Path("/a:b/hub_kernel"))
    with pytest.raises(ValueError, match="cannot hold /a:b/hub_kernel"):
        fa3.local_kernels()
    assert command.main(["kernel-path"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "cannot hold /a:b/hub_kernel" in printed.err


def test_the_folder_is_part_of_a_build(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sink_attention_ext" / "hub_kernel"
    assert {path.name for path in folder.iterdir()} == {"__init__.py", "metadata.json"}
    assert json.loads((folder / "metadata.json").read_text())["version"] == 1


# ---- signatures: what transformers inspects, and what callers pass by position ----


@pytest.mark.parametrize("name", hub_kernel.__all__)
def test_parameters_are_real_and_named(name: str) -> None:
    parameters = inspect.signature(getattr(hub_kernel, name)).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {"s_aux", "window_size", "causal", "softmax_scale", "softcap"} <= parameters.keys()
    assert not {"learnable_sink", "dropout_p"} & parameters.keys()


def test_order_of_parameters() -> None:
    varlen = list(inspect.signature(hub_kernel.flash_attn_varlen_func).parameters)
    assert varlen[:9] == [
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *("seqused_q", "seqused_k"),
    ]
    dense = list(inspect.signature(hub_kernel.flash_attn_func).parameters)
    # The tails are one: what follows the lengths is the same in both.
    assert varlen[9:] == dense[3:]
    cache = list(inspect.signature(hub_kernel.flash_attn_with_kvcache).parameters)
    assert cache[:6] == ["q", "k_cache", "v_cache", "k", "v", "qv"]
    assert {"page_table", "block_table"} <= set(cache)


# ---- results: those of this package's functions ----


def test_dense(backend: Backend) -> None:
    device, sinks = backend.device, SINKS.to(backend.device)
    q, k, v = qkv(2, 13, device=device)
    out, lse = hub_kernel.flash_attn_func(
        q, k, v, causal=True, window_size=(4, 4), softcap=20.0, s_aux=sinks
    )
    expected = backend.flash_attn(
        q, k, v, causal=True, window_size=(4, 0), softcap=20.0, s_aux=sinks
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_packed(backend: Backend) -> None:
    """Seven by position, as continuous batching does; 0-d maxima; an empty sequence."""
    device, sinks = backend.device, SINKS.to(backend.device)
    q, (k, v) = qkv(12, device=device)[0], qkv(20, device=device)[1:]
    cu_q, cu_k = lengths(0, 5, 5, 12, device=device), lengths(0, 9, 9, 20, device=device)
    given = {"softmax_scale": 0.3, "causal": True, "window_size": (3, 3), "s_aux": sinks.double()}
    out, lse = hub_kernel.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, torch.tensor(7), torch.tensor(11), **given
    )
    expected = backend.flash_attn_varlen(q, k, v, cu_q, cu_k, 7, 11, **given)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    used = lengths(4, 0, 11, device=device)
    out, _ = hub_kernel.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 11, None, used, **given)
    expected = backend.flash_attn_varlen(q, k, v, cu_q, cu_k, 7, 11, seqused_k=used, **given)
    assert torch.equal(out, expected[0])


def test_gradients_reach_the_sinks() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 9))
    sinks = SINKS.clone().requires_grad_()
    hub_kernel.flash_attn_func(q, k, v, causal=True, s_aux=sinks)[0].square().sum().backward()
    ours = [t.grad.clone() for t in (q, k, v, sinks)]
    for t in (q, k, v, sinks):
        t.grad = None
    out = sink_attention_ext.flash_attn_func(q, k, v, causal=True, s_aux=sinks)
    out.square().sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(ours, (q, k, v, sinks), strict=True))
    assert (sinks.grad != 0).all()


@pytest.mark.parametrize("name", hub_kernel.__all__)
def test_compiles_in_one_graph(name: str) -> None:
    function = getattr(hub_kernel, name)
    q, k, v = qkv(9) if "varlen" in name else qkv(1, 9)
    lengths_given = (lengths(0, 4, 9), lengths(0, 4, 9), 5, 5) if "varlen" in name else ()
    given = {"causal": True, "window_size": (3, 3), "s_aux": SINKS}
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    results = [f(q, k, v, *lengths_given, **given) for f in (function, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_last_stride_may_be_any() -> None:
    q, k, v = qkv(1, 9)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert all(t.stride(-1) != 1 for t in strided)
    out = hub_kernel.flash_attn_func(*strided, causal=True)[0]
    assert torch.equal(out, sink_attention_ext.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("table_name", ["page_table", "block_table"])
def test_paged_cache_is_updated_in_place(backend: Backend, table_name: str) -> None:
    """One new token for each of three sequences, as transformers' decode path calls it."""
    device, sinks = backend.device, SINKS.to(backend.device)
    q, k, v = qkv(3, 1, device=device)
    caches = [t.clone() for t in qkv(8, 4, seed=1, device=device)[1:]]
    theirs = [t.clone() for t in caches]
    table = torch.tensor([[7, 2], [0, -1], [3, 5]], dtype=torch.int32, device=device)
    old = lengths(5, 0, 7, device=device)
    given = {"causal": True, "window_size": (5, 0), "softmax_scale": 0.2, "s_aux": sinks}
    out = hub_kernel.flash_attn_with_kvcache(
        q=q,
        k_cache=caches[0],
        v_cache=caches[1],
        k=k,
        v=v,
        cache_seqlens=old,
        **{table_name: table},
        **given,
    )
    expected, _ = backend.flash_attn_with_kvcache(q, *theirs, k, v, old, table, **given)
    assert isinstance(out, torch.Tensor) and torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, theirs, strict=True))
    assert torch.equal(caches[0][2, 1], k[0, 0])  # token 5 of sequence 0: page 2, slot 1


def test_dense_cache_and_its_rows(backend: Backend) -> None:
    device, sinks = backend.device, SINKS.to(backend.device)
    q = qkv(2, 1, device=device)[0]
    caches = qkv(4, 6, seed=1, device=device)[1:]
    used = lengths(6, 3, device=device)
    rows = lengths(3, 1, device=device)
    out, lse = hub_kernel.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=used, cache_batch_idx=rows, return_softmax_lse=True, s_aux=sinks
    )
    chosen = [t[rows.long()] for t in caches]
    expected = backend.flash_attn_with_kvcache(q, *chosen, cache_seqlens=used, s_aux=sinks)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-6)


def test_packed_queries_and_new_keys(backend: Backend) -> None:
    device = backend.device
    q, k, v = qkv(5, device=device)
    caches = [t.clone() for t in qkv(8, 4, seed=1, device=device)[1:]]
    theirs = [t.clone() for t in caches]
    table, old, cu = (
        torch.tensor([[7, 2], [0, 3]], dtype=torch.int32, device=device),
        lengths(3, 0, device=device),
        lengths(0, 2, 5, device=device),
    )
    out = hub_kernel.flash_attn_with_kvcache(
        q,
        *caches,
        k,
        v,
        cache_seqlens=old,
        page_table=table,
        cu_seqlens_q=cu,
        cu_seqlens_k_new=cu.clone(),
        max_seqlen_q=3,
        causal=True,
    )
    expected, _ = backend.flash_attn_with_kvcache(q, *theirs, k, v, old, table, cu, 3, causal=True)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, theirs, strict=True))


# ---- what is refused, and what is not ----

HINTS = {"pack_gqa": True, "sm_margin": 8, "num_splits": 3}
TENSOR = torch.ones(1)
REFUSED = {
    "qv": TENSOR,
    "q_descale": TENSOR,
    "k_descale": TENSOR,
    "v_descale": TENSOR,
    "cp_world_size": 2,
    "cp_rank": 1,
    "cp_tot_seqused_k": TENSOR,
}
REFUSED_WITH_CACHE = {
    "rotary_cos": TENSOR,
    "rotary_sin": TENSOR,
    "rotary_seqlens": TENSOR,
    "cache_leftpad": TENSOR,
    "cu_seqlens_k_new": TENSOR,  # without k
}


def test_hints_change_no_result() -> None:
    q, k, v = qkv(2, 13)
    plain = hub_kernel.flash_attn_func(q, k, v, causal=True, s_aux=SINKS)
    hinted = hub_kernel.flash_attn_func(q, k, v, causal=True, s_aux=SINKS, **HINTS)
    assert all(torch.equal(a, b) for a, b in zip(plain, hinted, strict=True))
    plain = hub_kernel.flash_attn_with_kvcache(q, k, v, causal=True, s_aux=SINKS)
    hinted = hub_kernel.flash_attn_with_kvcache(
        q, k, v, causal=True, s_aux=SINKS, scheduler_metadata=TENSOR, **HINTS
    )
    torch.testing.assert_close(plain, hinted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*REFUSED, "seqused_q"])
def test_what_varlen_refuses(name: str) -> None:
    q, k, v = qkv(9)
    cu = lengths(0, 9)
    with pytest.raises(ValueError, match=f"^{name} must be "):
        hub_kernel.flash_attn_varlen_func(
            q, k, v, cu, cu, 9, 9, **{name: REFUSED.get(name, TENSOR)}
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_dense_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        hub_kernel.flash_attn_func(*qkv(1, 9), **{name: REFUSED[name]})


@pytest.mark.parametrize("name", REFUSED | REFUSED_WITH_CACHE)
def test_what_with_kvcache_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        hub_kernel.flash_attn_with_kvcache(
            *qkv(1, 9), **{name: (REFUSED | REFUSED_WITH_CACHE)[name]}
        )


def test_refused_calls_write_nothing() -> None:
    q, k, v = qkv(2, 1)
    caches = [t.clone() for t in qkv(4, 4, seed=1)[1:]]
    before = [t.clone() for t in caches]
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    cu = lengths(0, 1, 2)
    for error, message, given in (
        (ValueError, "only one of page_table and block_table", {"block_table": table}),
        (ValueError, "only one of page_table and cache_batch_idx", {"cache_batch_idx": cu[:2]}),
        (ValueError, "cu_seqlens_k_new must equal cu_seqlens_q", {"cu_seqlens_q": cu}),
        (ValueError, "cu_seqlens_k_new must equal cu_seqlens_q", {"cu_seqlens_k_new": cu}),
        (TypeError, "page_table must have dtype torch.int32", {"page_table": table.long()}),
    ):
        options = {"page_table": table, "cache_seqlens": lengths(1, 2)} | given
        with pytest.raises(error, match=message):
            hub_kernel.flash_attn_with_kvcache(q, *caches, k, v, **options)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches_are_refused(dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 9)
    with pytest.raises(TypeError, match=f"^k_cache must not be float8 or int8 .* got {dtype}"):
        hub_kernel.flash_attn_with_kvcache(q, k.to(dtype), v.to(dtype))
