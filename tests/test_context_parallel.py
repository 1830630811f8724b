"""A sequence spread over ranks: results and gradients are those of one process.

The ranks of a size are started once, run every case, and leave their shards in a file; the tests
compare what is in it, case by case.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import backends
import cases
import emulated
import oracle
import pytest
import tolerance
import torch
import torch.distributed as dist
from cases import DenseCase, Inputs, heads
from torch import Tensor
from two_ranks import on_ranks

from sink_attention_ext import flash_attn_func, ops
from sink_attention_ext.parallel import (
    context_parallel_attn_func,
    shard_sequence,
    unshard_sequence,
)

SEQLEN = 48  # shards of 24 and 12 rows, zigzag chunks of 12 and 6
LAYOUTS = ("contiguous", "zigzag")
Case = tuple[DenseCase, str]

MASKS = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (3, 0)},
    {"causal": True, "window_size": (5, -1)},
    {"causal": True, "window_size": (6, 0)},
    {"causal": True, "window_size": (11, 0)},
    {"causal": True, "window_size": (12, 0)},
    {"causal": True, "window_size": (31, 0)},
    {"window_size": (0, 0)},
    {"window_size": (4, 2)},
    {"window_size": (None, 7)},
    {"window_size": (1, None)},
    {"window_size": (13, 25)},
    {"window_size": (0, 12)},
)


def drawn_cases(count: int, seed: int, **fields: Any) -> list[Case]:
    drawn = cases.draw(
        count,
        seed,
        mask=MASKS,
        sequence_layout=LAYOUTS,
        heads=(heads(4, 4), heads(4, 2), heads(4, 1)),
        head_dims=({"head_dim": 16}, {"head_dim": 16, "head_dim_v": 8}, {"head_dim": 24}),
        softcap=(0.0, 0.0, 15.0),
        softmax_scale=(None, None, 0.3),
        layout=("contiguous", "padded", "transposed"),
        **fields,
    )
    result = []
    for i, options in enumerate(map(cases.merged, drawn)):
        sequence_layout = options.pop("sequence_layout")
        case = DenseCase(seqlen_q=SEQLEN, seqlen_k=SEQLEN, batch=1 + i % 2, seed=i, **options)
        result.append((case, sequence_layout))
    return result


CPU_CASES = drawn_cases(
    40,
    1,
    dtype=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    sink=("normal", "none", "mixed", "normal", "above"),
    sink_dtype=(torch.float32, torch.float32, torch.bfloat16),
)
EMULATED_CASES = drawn_cases(
    14, 2, dtype=(torch.float32, torch.bfloat16), sink=("normal", "none", "mixed")
)
CASES = {"cpu": CPU_CASES, "emulated-sm80": EMULATED_CASES}


# ---- on the ranks ----


def attention_of(layout: str, **options: Any) -> Callable[..., Any]:
    return functools.partial(context_parallel_attn_func, return_lse=True, layout=layout, **options)


def shard_of(inputs: Inputs, layout: str, group: dist.ProcessGroup | None = None) -> Inputs:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    q, k, v, dout = (
        shard_sequence(x, rank, world_size, layout)
        for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
    )
    dlse = shard_sequence(inputs.dlse, rank, world_size, layout, dim=2)
    return Inputs(q, k, v, inputs.s_aux, dout, dlse)


def run_cases(rank: int, folder: str, backend: str) -> None:
    use = emulated.emulated if backend in backends.EMULATED else contextlib.nullcontext
    with use():
        results = [
            oracle.run(
                attention_of(layout), shard_of(cases.make_dense(case), layout), case.options()
            )
            for case, layout in CASES[backend]
        ]
    torch.save(results, f"{folder}/{rank}.pt")


# ---- the test matrix ----

GRID = [
    pytest.param(backend, world_size, index, id=f"{backend}-{world_size} ranks-{layout} {case}")
    for backend, world_sizes in (("cpu", (2, 4)), ("emulated-sm80", (2,)))
    if backend in backends.BACKENDS
    for index, (case, layout) in enumerate(CASES[backend])
    for world_size in world_sizes
]


@functools.cache
def results(backend: str, world_size: int) -> list[list[oracle.Results]]:
    """Of each rank, its results of the backend's cases."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(world_size, run_cases, folder, backend)
        files = [f"{folder}/{rank}.pt" for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def together(of_ranks: list[dict[str, Tensor]], layout: str) -> oracle.Results:
    whole = {}
    for name in of_ranks[0]:
        parts = [of_rank[name] for of_rank in of_ranks]
        if name == "ds_aux":  # added up over the ranks: every rank has all of it
            assert all(torch.equal(part, parts[0]) for part in parts)
            whole[name] = parts[0]
        else:
            whole[name] = unshard_sequence(parts, layout, dim=2 if name == "lse" else 1)
    return oracle.Results(**whole)


@pytest.mark.parametrize(("backend_name", "world_size", "index"), GRID)
def test_equals_one_process(backend_name: str, world_size: int, index: int) -> None:
    """out, lse, dq, dk, dv and ds_aux, with gradients through out and lse."""
    case, layout = CASES[backend_name][index]
    of_ranks = [of_rank[index].items() for of_rank in results(backend_name, world_size)]
    actual = together(of_ranks, layout)
    tolerance.check(actual, oracle.expected(case), case.softcap)


# ---- what else holds, on each rank ----

CASE = DenseCase(
    seqlen_q=SEQLEN, seqlen_k=SEQLEN, head_dim=16, causal=True, window_size=(29, 0), seed=7,
    **heads(4, 2),
)  # fmt: skip


def run_shard(case: DenseCase = CASE, **options: Any) -> dict[str, Tensor]:
    shard = shard_of(cases.make_dense(case), "zigzag", options.get("group"))
    return oracle.run(attention_of("zigzag", **options), shard, case.options()).items()


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def repeats_bitwise_with_and_without_the_check(rank: int) -> None:
    assert_equal(run_shard(check_shards=False), run_shard(deterministic=True))


def a_group_of_some_ranks(rank: int) -> None:
    """Ranks within the group are not ranks of all: every other rank."""
    members = [list(range(dist.get_world_size()))[parity::2] for parity in (0, 1)]
    groups = [dist.new_group(ranks) for ranks in members]
    group, case = groups[rank % 2], [CASE, DenseCase(**vars(CASE) | {"seed": 8})][rank % 2]
    actual = run_shard(case, group=group)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, actual, group)
    tolerance.check(together(parts, "zigzag"), oracle.expected(case))
    if len(members[0]) > 1:
        assert not torch.equal(actual["out"], run_shard()["out"])
    else:
        run_shard()
    with pytest.raises(ValueError, match="group must hold this rank"):
        q = torch.randn(1, 4, 2, 8)
        context_parallel_attn_func(q, q, q, group=groups[1 - rank % 2])


def summands_of_the_sinks_gradient(rank: int) -> None:
    """reduce_ds_aux=False: each rank's own rows, which add up to the whole."""
    summand, whole = run_shard(reduce_ds_aux=False)["ds_aux"], run_shard()["ds_aux"]
    assert not torch.allclose(summand, whole)
    dist.all_reduce(summand)
    torch.testing.assert_close(summand, whole)


def gradients_of_out_or_of_lse_alone(rank: int) -> None:
    inputs = cases.make_dense(CASE)
    world_size = dist.get_world_size()
    for used, dim in ((0, 1), (1, 2)):
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.s_aux)]
        whole = flash_attn_func(*leaves[:3], s_aux=leaves[3], return_lse=True, **CASE.options())
        weights = (inputs.dout, inputs.dlse)[used]
        expected = torch.autograd.grad(whole[used], leaves, weights)
        shards = [shard_sequence(x.detach(), rank, world_size) for x in leaves[:3]]
        local = [x.requires_grad_() for x in (*shards, inputs.s_aux.detach())]
        result = attention_of("contiguous")(*local[:3], s_aux=local[3], **CASE.options())
        weights = shard_sequence(weights, rank, world_size, dim=dim)
        actual = torch.autograd.grad(result[used], local, weights)
        for ours, right in zip(actual[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, shard_sequence(right, rank, world_size))
        torch.testing.assert_close(actual[3], expected[3])


def frozen_sinks_autocast_and_no_grad(rank: int) -> None:
    shard = shard_of(cases.make_dense(CASE), "zigzag")
    attention = attention_of("zigzag", s_aux=shard.s_aux, **CASE.options())
    q, k, v = (x.detach().requires_grad_() for x in (shard.q, shard.k, shard.v))
    out, lse = attention(q, k, v)
    for ours, right in zip(
        torch.autograd.grad((out, lse), (q, k, v), (shard.dout, shard.dlse)),
        [run_shard()[name] for name in ("dq", "dk", "dv")],
        strict=True,
    ):
        assert torch.equal(ours, right)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v)[0], out)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = attention(q, k, v)
    expected, _ = attention(*(x.detach().bfloat16() for x in (q, k, v)))
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, expected)


def no_second_derivative(rank: int) -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = context_parallel_attn_func(q, q, q)
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def beside_compiled_code(rank: int) -> None:
    if dist.get_world_size() > 2:
        return  # the same, and tracing takes seconds
    attention = torch.compiler.disable(context_parallel_attn_func)

    def double(q: Tensor, s_aux: Tensor) -> Tensor:
        return 2 * attention(q + 1, q, q, causal=True, s_aux=s_aux)

    q, s_aux = torch.randn(1, 6, 2, 8), torch.zeros(2)
    compiled = torch.compile(double, backend="eager")
    torch.testing.assert_close(compiled(q, s_aux), double(q, s_aux))


BEHAVIOURS = (
    repeats_bitwise_with_and_without_the_check,
    a_group_of_some_ranks,
    summands_of_the_sinks_gradient,
    gradients_of_out_or_of_lse_alone,
    frozen_sinks_autocast_and_no_grad,
    no_second_derivative,
    beside_compiled_code,
)


def refusals(rank: int) -> None:
    """One rank's mistake is an error on every rank, by name, and nobody is left waiting."""
    last = dist.get_world_size() - 1

    def refused(error: type[Exception], message: str, *lengths: int, **options: Any) -> None:
        """lengths: of the shards of rank 0 and of the last one."""
        first, length = lengths or (4, 4)
        q = torch.randn(1, length if rank == last else first, 2, 8)
        with pytest.raises(error, match=message):
            context_parallel_attn_func(q, q, q, **options)

    unequal = r"the shape of q must be the same on every rank .* \(1, 4, .* rank {} has \(1, 6, "
    refused(ValueError, unequal.format(last), 4, 6)
    refused(ValueError, unequal.format(last), 4, 6, layout="zigzag")
    theirs = "" if rank == last else f"rank {last} of the group refuses its arguments: "
    refused(ValueError, f"^{theirs}q must have .* at least one row .*\\(1, 0, 2, 8\\)", 4, 0)
    refused(ValueError, f"^{theirs}q must have an even number .*\\(1, 5, ", 4, 5, layout="zigzag")
    refused(
        ValueError,
        f"^{theirs}window_size must .* left = -2",
        window_size=(5 - 7 * (rank == last), 0),
    )
    refused(ValueError, "window_size with causal must be the same", window_size=(5 + rank, 0))
    refused(
        ValueError, "the shape of s_aux must be", s_aux=None if rank == last else torch.zeros(2)
    )
    refused(ValueError, "s_aux has 4 logits, q has 2 heads", s_aux=torch.zeros(4))
    refused(ValueError, "layout must be .* 'ring'", layout="ring")
    refused(TypeError, "return_lse must be True or False", return_lse=1)
    refused(TypeError, "group must be None or .* got str", group="world")
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"k must have seqlen_k = 4 .*\(1, 6, 2, 8\)"):
        context_parallel_attn_func(q, k, k)
    with pytest.raises(ValueError, match="what requires grad must be the same"):
        context_parallel_attn_func(q.requires_grad_(rank == 0), q.detach(), q.detach())
    with pytest.raises(ValueError, match="q must have .* at least one row"):
        context_parallel_attn_func(q[:, :0], q[:, :0], q[:, :0], check_shards=False)
    run_shard()  # and all is as before


def refused_before_a_message(rank: int) -> None:
    """Whatever one rank or all have against their arguments, nobody waits and the group lives."""
    last = dist.get_world_size() - 1
    q, sinks = torch.randn(1, 4, 2, 8), torch.zeros(2)
    float8 = q.to(torch.float8_e4m3fn)
    expected = context_parallel_attn_func(q, q, q)
    bad: dict[str, tuple[Tensor, ...] | dict[str, Any]] = {
        "q must have dtype float64, float32, .* got torch.float8": (float8, float8, float8),
        "q must have dtype": (q.long(), q.long(), q.long()),
        "v must": (q, q, q.double()),
        "q must hold values": (q.to("meta"),) * 3,
        "k must have": (q, q[:, :3], q[:, :3]),
        "s_aux must have dtype": {"s_aux": sinks.to(torch.int8)},
        "softcap": {"softcap": -1.0},
        "softmax_scale": {"softmax_scale": "x"},
        "deterministic": {"deterministic": 1},
        "check_shards": {"check_shards": "yes"},
        "reduce_ds_aux": {"reduce_ds_aux": None},
        "layout": {"layout": ["zigzag"]},
        "window_size": {"window_size": 5},
    }
    for message, arguments in bad.items():
        for is_bad in (True, rank == last, rank == 0):
            tensors, options = (q, q, q), {}
            if is_bad and isinstance(arguments, dict):
                options = arguments
            elif is_bad:
                tensors = arguments
            with pytest.raises((TypeError, ValueError), match=message):
                context_parallel_attn_func(*tensors, **options)
            assert torch.equal(context_parallel_attn_func(q, q, q), expected)
    for tensors in ((float8, float8, float8), (q, q[:, :3], q[:, :3])):  # all of them, unchecked
        with pytest.raises((TypeError, ValueError), match="must have"):
            context_parallel_attn_func(*tensors, check_shards=False)
        assert torch.equal(context_parallel_attn_func(q, q, q, check_shards=False), expected)


def a_refusal_of_the_operators(rank: int) -> None:
    """One that the checks in Python do not foresee comes before the messages, too."""
    q = torch.randn(1, 4, 2, 8)
    flash_attn_fwd = ops.flash_attn_fwd

    def refuses(*args: Any) -> Any:
        raise RuntimeError("an operator's refusal")

    if rank == 0:
        ops.flash_attn_fwd = refuses
    try:
        with pytest.raises((ValueError, RuntimeError), match="an operator's refusal"):
            context_parallel_attn_func(q, q, q)
    finally:
        ops.flash_attn_fwd = flash_attn_fwd
    context_parallel_attn_func(q, q, q)


def behave(rank: int) -> None:
    refusing = (refusals, refused_before_a_message, a_refusal_of_the_operators)
    for behaviour in (*BEHAVIOURS, *refusing):
        try:
            behaviour(rank)
        except Exception as error:
            raise RuntimeError(f"{behaviour.__name__} failed on rank {rank}") from error


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_behaviour(world_size: int) -> None:
    """BEHAVIOURS and refusals. On one set of ranks, since starting them takes longest."""
    on_ranks(world_size, behave)


def test_without_a_process_group() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="call torch.distributed.init_process_group first"):
        context_parallel_attn_func(q, q, q)
