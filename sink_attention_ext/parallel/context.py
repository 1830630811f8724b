"""Context parallelism: each rank holds a part of the sequence, and attention goes over all of it.

The rows stay where they are, and keys and values come to them (exchange.py). Each block of keys
gives a partial result without the sink, merge_attn_states joins them, and the sink enters once, at
the end. The backward uses that global out and lse in every block: with lse given, P = exp(s - lse)
is the final probability, so a block's gradients are final summands too, and they are added up.

Tested with the gloo backend. NCCL takes the same calls and has not been run, for want of two GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sink_attention_ext import checks, ops
from sink_attention_ext.autocast import autocast_dtype
from sink_attention_ext.dispatch_rules import is_deterministic
from sink_attention_ext.parallel.exchange import Exchange, add_rows, check_agreement
from sink_attention_ext.parallel.layout import Sharding, Tile, chunks_of
from sink_attention_ext.reference import WindowSize


@dataclass(frozen=True)
class _Call:
    """The arguments that are no tensors."""

    group: dist.ProcessGroup
    sharding: Sharding
    softmax_scale: float
    softcap: float
    deterministic: bool
    reduce_ds_aux: bool

    def op_options(self, tile: Tile) -> tuple[Any, ...]:
        """The last arguments of flash_attn_fwd and of flash_attn_bwd, which are the same."""
        window = (tile.window_left, tile.window_right)
        num_sink_tokens = 0  # a tile does not begin at the sequence's first token
        factors = self.softmax_scale, False, *window, self.softcap
        return *factors, is_deterministic(self.deterministic), num_sink_tokens


def _rows_and_keys(tile: Tile) -> tuple[slice, slice]:
    return (
        slice(tile.q_start, tile.q_start + tile.length),
        slice(tile.k_start, tile.k_start + tile.length),
    )


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        # Sums in float32 (float64). flash_attn_fwd rounds each part to the dtype of q, and the sum
        # is rounded again at the end.
        dtype = ops.lse_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype)
        for step in Exchange(call.group, call.sharding).steps(k, v):
            for tile in step.block.tiles:
                rows, keys = _rows_and_keys(tile)
                part = ops.flash_attn_fwd(
                    q[:, rows], step.k[:, keys], step.v[:, keys], None, *call.op_options(tile)
                )
                out[:, rows], lse[:, :, rows] = _merge(out[:, rows], lse[:, :, rows], part)
        # The sink last: a part with lse = +inf, as a sink of +inf makes it, would count as empty.
        if s_aux is not None:
            out, lse = ops.merge_attn_states([out], [lse], s_aux)
        out = out.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "context_parallel_attn_func: the gradient is not differentiable a second time "
                "(double backward): take it without create_graph=True"
            )
        call: _Call = ctx.call
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        ds_aux, sink = None, None
        if s_aux is not None and ctx.needs_input_grad[3]:
            sink = s_aux.to(lse.dtype)
            ds_aux = torch.zeros_like(sink)
        exchange = Exchange(call.group, call.sharding)
        for step in exchange.steps(k, v):
            dk_step, dv_step = (torch.zeros_like(x, dtype=lse.dtype) for x in (step.k, step.v))
            for tile in step.block.tiles:
                rows, keys = _rows_and_keys(tile)
                # ds_aux depends on a row's out and lse alone: once for each row, not each block.
                with_sink = tile.is_diagonal and sink is not None
                dq_tile, dk_tile, dv_tile, ds_aux_tile = ops.flash_attn_bwd(
                    dout[:, rows], None if dlse is None else dlse[:, :, rows],
                    q[:, rows], step.k[:, keys], step.v[:, keys],
                    out[:, rows], lse[:, :, rows], sink if with_sink else None,
                    *call.op_options(tile),
                )  # fmt: skip
                dq[:, rows] += dq_tile
                dk_step[:, keys] += dk_tile
                dv_step[:, keys] += dv_tile
                if with_sink:
                    ds_aux += ds_aux_tile
            if step.source == exchange.rank:
                add_rows(dk, step.block.ranges, dk_step)
                add_rows(dv, step.block.ranges, dv_step)
            else:
                exchange.return_gradients(step, dk_step.to(k.dtype), dv_step.to(v.dtype), (dk, dv))
        exchange.finish_gradients((dk, dv))
        if ds_aux is not None:
            if call.reduce_ds_aux:
                dist.all_reduce(ds_aux, group=call.group)
            ds_aux = ds_aux.to(s_aux.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), ds_aux, None


def _merge(out: Tensor, lse: Tensor, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    outs = [out.contiguous(), part[0].to(out.dtype).contiguous()]
    return ops.merge_attn_states(outs, [lse.contiguous(), part[1].contiguous()], None)


def context_parallel_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
    layout: str = "contiguous",
    reduce_ds_aux: bool = True,
    check_shards: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_func over a sequence whose rows are spread over the ranks of a process group.

    Every rank calls it with its shard of q, k and v, and gets its shard of the result that
    flash_attn_func would give for the whole. Differentiable in q, k, v and s_aux. Known elsewhere
    as ring attention; of its variants this one sends keys and values from owner to reader, only
    those that the reader's rows see (none after them under causal, ``left`` of them under a
    window), while earlier ones are computed with.

    It is a collective: every rank of the group has to call it, and, if anything requires grad, the
    backward of it, in the same order as other communication. So the loss of every rank must depend
    on the result, if only by ``0 * out.sum()``.

    Args:
        q: (batch, seqlen / world_size, num_heads_q, head_dim), this rank's rows; at least one, on
            every rank equally many. float64, float32, float16 or bfloat16.
        k: (batch, seqlen / world_size, num_heads_kv, head_dim), of the same tokens as q.
        v: (batch, seqlen / world_size, num_heads_kv, head_dim_v).
        softmax_scale, causal, window_size, softcap, deterministic, return_lse: as in
            flash_attn_func, the window in tokens of the whole sequence.
        s_aux: (num_heads_q,) sinks, any float dtype; the same values on every rank.
        group: the ranks that share the sequence, in its order; None: all (the default group).
        layout: which rows a rank holds (shard_sequence cuts them out). "contiguous": the rank'th
            part of world_size. "zigzag": parts rank and 2 * world_size - 1 - rank of 2 *
            world_size, which evens out the ranks' work under a causal mask; an even number of rows.
        reduce_ds_aux: the gradient of s_aux is added up over the group, as belongs to a parameter
            that all ranks hold: every rank gets the gradient of the sum of all ranks' losses.
            False: every rank gets its own rows' summand, as it does for the weights of its other
            layers. That is for training where DDP, FSDP or the like reduces the gradients of all
            parameters over these ranks, the sinks' among them.
        check_shards: compare shapes, dtypes and options over the ranks before anything is computed,
            which takes a small all-gather and waits for the device. False saves that, needs to be
            False on every rank, and leaves wrong shards to the communication library, which may
            hang. Whatever a rank refuses of its own is refused before any message in both cases.

    Returns:
        out (batch, seqlen / world_size, num_heads_q, head_dim_v) in the dtype of q; with return_lse
        ``(out, lse)``, lse (batch, num_heads_q, seqlen / world_size) float32 (float64 for float64),
        the sink included, with an exact gradient.

    Raises:
        TypeError, ValueError: an argument does not fit, here or, with check_shards, on another
            rank, or shards are empty or unequal; the message names it. Nothing has been computed.
        RuntimeError: from a backward with create_graph=True: there is no second derivative.

    Of a packed batch (cu_seqlens) there is no version. Under torch.autocast q, k and v are cast to
    autocast's dtype. torch.compile does not trace the exchange: in a model that is compiled call
    ``torch.compiler.disable(context_parallel_attn_func)``.

    Example::

        rank, world_size = dist.get_rank(), dist.get_world_size()
        q, k, v = (shard_sequence(x, rank, world_size, "zigzag") for x in (q, k, v))
        out = context_parallel_attn_func(
            q, k, v, causal=True, window_size=(127, 0), s_aux=sinks, layout="zigzag"
        )
    """
    group = _check_group(group)
    error, facts = None, {}
    try:
        checks.check_bool("check_shards", check_shards)
        s_aux = _check_shard(q, k, v, s_aux, layout)
        window = checks.check_window(window_size, checks.check_bool("causal", causal))
        sharding = Sharding(dist.get_world_size(group), layout, q.shape[1], window)
        scale = checks.check_softmax_scale(softmax_scale, q.shape[-1], q.dtype)
        call = _Call(
            group,
            sharding,
            scale,
            checks.check_softcap(softcap, q.dtype, scale),
            checks.check_bool("deterministic", deterministic),
            checks.check_bool("reduce_ds_aux", reduce_ds_aux),
        )
        checks.check_bool("return_lse", return_lse)
        q, k, v = (x.to(autocast_dtype(x) or x.dtype) for x in (q, k, v))
        _try_one_row(q, k, v, s_aux, call, "meta" if check_shards is False else q.device)
        facts = _facts(q, k, v, s_aux, call)
    except Exception as wrong:  # of any kind: the other ranks must hear of it
        error = wrong
    if check_shards is not False:  # what is neither True nor False is told the others, too
        check_agreement(group, facts, error)
    elif error is not None:
        raise error
    out, lse = _ContextParallelAttention.apply(q, k, v, s_aux, call)
    return (out, lse) if return_lse else out


def _check_group(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group needs torch.distributed: call torch.distributed.init_process_group first"
        )
    if group is None:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must hold this rank; got a group of other ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be None or a torch.distributed.ProcessGroup (of a DeviceMesh: "
            f"mesh.get_group()); got {type(group).__name__}"
        )
    return group


def _check_shard(q: Any, k: Any, v: Any, s_aux: Any, layout: Any) -> Tensor | None:
    """What can be said of this rank's tensors alone; the checked s_aux."""
    checks.check_qkv(q, k, v, (checks.Q_DENSE, checks.K_DENSE, checks.V_DENSE))
    if q.device.type == "meta":
        raise ValueError("q must hold values, which ranks exchange; got a meta tensor")
    checks.check_float_dtype("q", q)  # and so k and v: float8 is for the forward of one process
    s_aux = checks.check_s_aux(s_aux, q.shape[2], q.device)
    if q.shape[0] < 1 or q.shape[1] < 1:
        raise ValueError(
            "q must have a batch and a shard of at least one row on every rank; got shape "
            f"{checks.shape_text(q)}"
        )
    checks.check_size("k", k, 1, "seqlen_k", q.shape[1], "the tokens that q has")
    if q.shape[1] % len(chunks_of(0, 1, layout)) != 0:
        raise ValueError(
            f'q must have an even number of rows, two chunks, in layout "{layout}"; got shape '
            f"{checks.shape_text(q)}"
        )
    return s_aux


def _try_one_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    call: _Call,
    device: torch.device | str,
) -> None:
    """Whatever the operators refuse, they refuse here, and not while other ranks wait for keys.

    On the device "meta" nothing is launched.
    """
    with torch.no_grad():
        row = (x[:1, :1].to(device) for x in (q, k, v))
        s_aux = None if s_aux is None else s_aux.to(device)
        tile = Tile(0, 0, 1, -1, -1)
        out, lse = ops.flash_attn_fwd(*row, None, *call.op_options(tile))
        ops.merge_attn_states([out], [lse], s_aux)


def _facts(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, call: _Call) -> dict[str, Any]:
    tensors = {"q": q, "k": k, "v": v, "s_aux": s_aux}
    with_grad = [n for n, t in tensors.items() if t is not None and t.requires_grad]
    facts: dict[str, Any] = {
        f"the shape of {name}": None if t is None else tuple(t.shape) for name, t in tensors.items()
    }
    facts |= {
        "the dtype of q": str(q.dtype),
        "the device type of q": q.device.type,
        "layout": call.sharding.layout,
        "window_size with causal": call.sharding.window,
        "softmax_scale": call.softmax_scale,
        "softcap": call.softcap,
        "reduce_ds_aux": call.reduce_ds_aux,
        "what requires grad": with_grad if torch.is_grad_enabled() else [],
    }
    return facts
