"""Checks a measured result against float64 attention on rows that are cheap to recompute.

Recomputing all of S = 8192 in float64 would take longer than the benchmark. Instead: random query
rows and the last rows of every head for `out` and `dq`; the last keys for `dk` and `dv`, because
in a causal layer only those last rows see them; and every row of head 0 for `ds_aux`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from cases import Problem
from timing import WrongResultError

NUM_RANDOM_ROWS = 16
NUM_LAST_ROWS = 16
# Of the largest reference value. bf16 keeps 8 bits, and the probabilities are rounded to them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def attend_rows(
    problem: Problem,
    rows: torch.Tensor,
    q_rows: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Float64 attention of q_rows `(rows, heads, d)` on k and v `(seqlen, kv heads, d)`."""
    num_rows, num_heads_q, head_dim = q_rows.shape
    num_keys, num_heads_kv, _ = k.shape
    grouped = q_rows.view(num_rows, num_heads_kv, num_heads_q // num_heads_kv, head_dim)
    logits = torch.einsum("rhgd,khd->hgrk", grouped, k) * head_dim**-0.5
    logits = logits.masked_fill(~problem.visible(rows, num_keys), float("-inf"))
    if s_aux is not None:
        sink = s_aux.view(num_heads_kv, -1, 1, 1).expand(-1, -1, num_rows, 1)
        logits = torch.cat([logits, sink], dim=-1)
    probs = logits.softmax(dim=-1)[..., :num_keys]
    return torch.einsum("hgrk,khd->rhgd", probs, v).reshape(q_rows.shape)


def ds_aux_of_head_0(problem: Problem) -> torch.Tensor:
    """The whole gradient of the first head's sink, over all rows in chunks."""
    q, k, v, dout = (t[0, :, :1].double() for t in (problem.q, problem.k, problem.v, problem.dout))
    total = torch.zeros(1, dtype=torch.float64, device=problem.device)
    for rows in torch.arange(problem.seqlen, device=problem.device).split(1024):
        s_aux = problem.s_aux[:1].double().requires_grad_()
        num_keys = int(rows[-1]) + 1  # a causal row sees no later key
        out = attend_rows(problem, rows, q[rows], k[:num_keys], v[:num_keys], s_aux)
        total += torch.autograd.grad(out, s_aux, dout[rows])[0]
    return total


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (got.double() - expected).abs().max()
    return (difference / expected.abs().max()).item()


@functools.lru_cache(maxsize=2)  # the peers of one problem share them, with and without the sink
def make_check(problem: Problem, *, sink: bool, backward: bool) -> Callable[..., float]:
    """A function of `(out, dq, dk, dv, ds_aux)` (or `(out,)`), each `(1, seqlen, heads, d)`."""
    first_last_row = max(problem.seqlen - NUM_LAST_ROWS, 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(first_last_row, (NUM_RANDOM_ROWS,), generator=generator).unique()
    rows = torch.cat([rows, torch.arange(first_last_row, problem.seqlen)]).to(problem.device)
    k, v = problem.k[0].double(), problem.v[0].double()
    q_rows, dout_rows = problem.q[0, rows].double(), problem.dout[0, rows].double()
    leaves = [t.requires_grad_(backward) for t in (q_rows, k, v)]
    out = attend_rows(problem, rows, *leaves, problem.s_aux.double() if sink else None)
    expected = {"out": (rows, out.detach())}
    if backward:
        dq, dk, dv = torch.autograd.grad(out, leaves, dout_rows)
        last = torch.arange(first_last_row, problem.seqlen, device=problem.device)
        expected |= {"dq": (rows, dq), "dk": (last, dk[last]), "dv": (last, dv[last])}
    ds_aux = ds_aux_of_head_0(problem) if sink and backward else None
    del leaves, k, v, out

    def check(results: tuple[torch.Tensor, ...]) -> float:
        errors = {
            name: relative_error(result[0, where], reference)
            for result, (name, (where, reference)) in zip(results, expected.items(), strict=False)
        }
        if ds_aux is not None:
            # One number, which can be near 0 by chance: so a typical gradient is added to it.
            scale = ds_aux.abs() + expected["dq"][1].abs().max()
            errors["ds_aux"] = ((results[4][:1].double() - ds_aux).abs() / scale).item()
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= TOLERANCE[problem.dtype]:  # a NaN must fail too
            raise WrongResultError(f"{worst} is off the float64 reference by {errors[worst]:.1e}")
        return errors[worst]

    return check
