"""Tensor parallelism: each rank attends with some of the heads, and with the sinks of those heads.

Attention needs no communication then: a rank calls the ordinary functions with its own q, k, v and
s_aux, and the output projection, sharded by rows, adds the ranks' results up. What can go wrong is
that the heads are sharded and the sinks are not; every function refuses that by name.

With transformers the plan is the user's (transformers 5 ships none for GPT-OSS)::

    model = AutoModelForCausalLM.from_pretrained(
        "openai/gpt-oss-20b",
        attn_implementation="sink_attention",
        distributed_config=DistributedConfig(tp_plan=GPT_OSS_TP_PLAN, tp_size=2),
    )

Without transformers `shard_heads` says which heads a rank holds, and `shard_s_aux` takes its sinks.

DTensors: s_aux may be one (a sharded module's parameter is), and its local part is used, in every
function of this package; its gradient is a DTensor of the same placements. q, k and v may not,
since a projection's output under such a plan is plain; a DTensor there is a TypeError that says
``q.to_local()``. A *replicated* s_aux whose ranks see different rows has a gradient to be summed
over them, which its placements don't say: pass ``s_aux.to_local(grad_placements=[Partial()])``.
"""

from __future__ import annotations

from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.parallel.layout import check_rank

_LAYER = "model.layers.*.self_attn"

GPT_OSS_TP_PLAN: dict[str, str] = {
    f"{_LAYER}.q_proj": "colwise",
    f"{_LAYER}.k_proj": "colwise",
    f"{_LAYER}.v_proj": "colwise",
    f"{_LAYER}.o_proj": "rowwise",
    f"{_LAYER}.sinks": "colwise",
}
"""The attention of GptOssForCausalLM, as ``DistributedConfig(tp_plan=...)`` of transformers 5 takes
it. The experts stay whole on every rank; add rules for them to a copy. The number of ranks must
divide the number of kv heads (8 in gpt-oss-20b and -120b): transformers cuts k_proj by rows, and a
part of a head fits no view.

Transformers 4 had a plan in the config, ``base_model_tp_plan``, with keys that start at
``layers.`` and ``"layers.*.self_attn.sinks": "local_rowwise"`` (a style that transformers 5 no
longer knows): there the sinks reach attention as a plain tensor of this rank's heads, which works
unchanged.
"""


def _check_heads(num_heads_q: int, world_size: int) -> None:
    checks.check_int("num_heads_q", num_heads_q)
    if num_heads_q < 1 or num_heads_q % world_size != 0:
        raise ValueError(
            f"world_size must divide num_heads_q; got world_size {world_size} and num_heads_q "
            f"{num_heads_q}"
        )


def shard_heads(
    num_heads_q: int, num_heads_kv: int, rank: int, world_size: int
) -> tuple[slice, slice]:
    """Which query heads and which kv heads tensor parallel rank `rank` holds.

    Each rank has ``num_heads_q / world_size`` consecutive query heads, and the kv heads that these
    read. With more ranks than kv heads, a kv head is held by ``world_size / num_heads_kv``
    consecutive ranks, one each, as vLLM does; the gradient of such a head is then the sum of theirs
    over those ranks.

    Args:
        num_heads_q, num_heads_kv: of the whole model.
        rank: from 0 to world_size - 1.
        world_size: number of ranks; divides num_heads_q, and divides num_heads_kv or is a multiple
            of it.

    Returns:
        (heads_q, heads_kv), slices of the head dimension: ``q[..., heads_q, :]``. Of a projection's
        weight (num_heads * head_dim, hidden_size) they are rows, times head_dim.

    Raises:
        TypeError: an argument is no int.
        ValueError: the heads do not divide.

    Example::

        heads_q, heads_kv = shard_heads(64, 8, rank, world_size)
        out = flash_attn_func(
            q[..., heads_q, :], k[..., heads_kv, :], v[..., heads_kv, :],
            causal=True, s_aux=shard_s_aux(s_aux, rank, world_size),
        )
    """
    check_rank(rank, world_size)
    _check_heads(num_heads_q, world_size)
    checks.check_int("num_heads_kv", num_heads_kv)
    if num_heads_kv < 1 or num_heads_q % num_heads_kv != 0:
        raise ValueError(
            f"num_heads_kv must divide num_heads_q; got {num_heads_kv} and {num_heads_q}"
        )
    if num_heads_kv % world_size != 0 and world_size % num_heads_kv != 0:
        raise ValueError(
            "world_size must divide num_heads_kv, or be a multiple of it (each kv head on several "
            f"ranks); got world_size {world_size} and num_heads_kv {num_heads_kv}"
        )
    local_q = num_heads_q // world_size
    local_kv = max(num_heads_kv // world_size, 1)
    first_kv = rank * num_heads_kv // world_size
    return slice(rank * local_q, (rank + 1) * local_q), slice(first_kv, first_kv + local_kv)


def shard_s_aux(s_aux: Tensor, rank: int, world_size: int) -> Tensor:
    """The sinks of the query heads that `shard_heads` gives to `rank`.

    Args:
        s_aux: (num_heads_q,), the sinks of all heads, any float dtype.
        rank: from 0 to world_size - 1.
        world_size: number of ranks; divides num_heads_q.

    Returns:
        (num_heads_q / world_size,), a view. As a gradient reaches only those, gather or add up over
        the ranks where one copy of all sinks is trained.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: s_aux is not a vector of a length that world_size divides.
    """
    checks.check_tensor("s_aux", s_aux, ("num_heads_q",))
    checks.check_float_dtype("s_aux", s_aux)
    check_rank(rank, world_size)
    _check_heads(s_aux.shape[0], world_size)
    local = s_aux.shape[0] // world_size
    return s_aux[rank * local : (rank + 1) * local]
