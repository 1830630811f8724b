"""plan_kvcache: what the layers of one decode or prefill step share, checked once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sink_attention_ext import checks
from sink_attention_ext.cache import checks as cache_checks
from sink_attention_ext.fake_checks import MAX_DRAFT_TOKENS

NAMES = ("cache_seqlens", "block_table", "cu_seqlens_q", "tree_mask")


class KVCachePlan:
    """Lengths, tables and bounds of one step: plan_kvcache makes it, flash_attn_with_kvcache takes
    it as ``plan``, once for each layer.

    Attributes:
        cache_seqlens, block_table, cu_seqlens_q, tree_mask: the caller's tensors, not copies.
        max_seqlen_q, max_seqlen_k: bounds that hold for all values that the tensors will have.
        num_splits: as in flash_attn_with_kvcache.
        page_shape: (num_pages, page_size) of the caches; of dense ones (batch, seqlen_cache).
    """

    def __init__(
        self,
        cache_seqlens: Tensor,
        block_table: Tensor | None,
        cu_seqlens_q: Tensor | None,
        tree_mask: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_splits: int,
        page_shape: tuple[int, int],
        appends: bool,
    ) -> None:
        self.cache_seqlens = cache_seqlens
        self.block_table = block_table
        self.cu_seqlens_q = cu_seqlens_q
        self.tree_mask = tree_mask
        self.max_seqlen_q = max_seqlen_q
        self.max_seqlen_k = max_seqlen_k
        self.num_splits = num_splits
        self.page_shape = page_shape
        self.appends = appends

    def update(
        self,
        cache_seqlens: Tensor | None = None,
        block_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        tree_mask: Tensor | None = None,
    ) -> None:
        """Copies the values of the next step into the plan's own tensors, at their addresses.

        A captured CUDA graph then replays on them. To fill those tensors oneself is as good; this
        also checks the values, where the host can read the given tensors (as those in host memory,
        from which the copy is made in the order of the stream), against the plan's bounds.

        Args:
            cache_seqlens, block_table, cu_seqlens_q, tree_mask: of the shape and dtype of the
                plan's, on its device or in host memory; None: as they are.

        Raises:
            TypeError, ValueError: a tensor does not fit, or a value is out of the plan's bounds;
                nothing has been changed.
        """
        given = dict(zip(NAMES, (cache_seqlens, block_table, cu_seqlens_q, tree_mask), strict=True))
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        for name, tensor in given.items():
            own = getattr(self, name)
            if own is None:
                raise ValueError(f"{name} must be None: the plan was made without it")
            cache_checks.check_kinds(**{name: (tensor, None)})
            if tensor.dtype != own.dtype:
                raise TypeError(f"{name} must have dtype {own.dtype}; got {tensor.dtype}")
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{name} must have the shape of the plan's, {tuple(own.shape)}; got "
                    f"{checks.shape_text(tensor)}"
                )
            if tensor.device != own.device and tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} must be on {own.device} or in host memory; got {tensor.device}"
                )
        _check_values({name: given.get(name, getattr(self, name)) for name in NAMES}, self)
        for name, tensor in given.items():
            getattr(self, name).copy_(tensor, non_blocking=True)


def plan_kvcache(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_cache: Tensor,
    *,
    appends: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | torch.SymInt | Tensor | None = None,
    max_seqlen_k: int | torch.SymInt | Tensor | None = None,
    num_splits: int = 0,
    tree_mask: Tensor | None = None,
) -> KVCachePlan:
    """What the layers of one step share, for ``flash_attn_with_kvcache(..., plan=plan)``.

    Made once a step. Each layer's call then looks at none of it again but for what protects memory:
    on the CPU the operator reads the values, which takes it less than a microsecond.

    Graph-safe: the plan holds the given tensors, and its numbers are the bounds that a captured
    CUDA graph keeps. Make it once of buffers that stay, with the largest max_seqlen_q and
    max_seqlen_k that a replay will have; before a replay fill the buffers, or call
    ``plan.update``. A sequence that is longer than a bound is cut there.

    Args:
        cache_seqlens: (batch,) int32, the keys of each sequence: before the append if `appends`,
            else all.
        block_table: (batch, max_pages_per_seq) int32; None: dense caches, a row for each sequence.
        k_cache: any layer's: its shape and device count. All layers that use the plan have as many
            pages of the same size.
        appends: whether the calls give k and v.
        cu_seqlens_q: (batch + 1,) int32: q, k and v are packed.
        max_seqlen_q: at least the longest query length. None is 1, or the length of tree_mask; with
            cu_seqlens_q it must be given.
        max_seqlen_k: at least the longest sequence, new keys included; None is all that
            block_table, or a dense cache, has room for. Splits and workspace follow it.
        num_splits: as in flash_attn_with_kvcache. 0: each call chooses by max_seqlen_q,
            max_seqlen_k, its heads and its window, so that layers of one shape choose alike.
        tree_mask: as in flash_attn_with_kvcache.

    Raises:
        TypeError, ValueError: an argument does not fit, or (where the host can read them: on the
            CPU, and on CUDA under set_debug_checks) a value in it is out of range.

    Example::

        cache = torch.zeros(2, 3, 16, 4, 2, 64)  # k and v of 3 layers: 16 pages of 4 tokens
        lengths = torch.tensor([5, 2], dtype=torch.int32)
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        plan = plan_kvcache(lengths, table, cache[0, 0], max_seqlen_k=8)
        for _ in range(2):  # steps; captured in a CUDA graph, the body of this loop is replayed
            for layer in range(3):
                q, k, v = (torch.randn(2, 1, heads, 64) for heads in (8, 2, 2))
                out = flash_attn_with_kvcache(
                    q, cache[0, layer], cache[1, layer], k, v, plan=plan, causal=True
                )
            plan.update(cache_seqlens=lengths + 1)
    """
    checks.check_bool("appends", appends)
    packed = cu_seqlens_q is not None
    cache_checks.check_kinds(
        cache_seqlens=(cache_seqlens, ("batch",)),
        block_table_=(block_table, ("batch", "max_pages_per_seq")),
        k_cache=(k_cache, cache_checks.K_CACHE),
        cu_seqlens_q_=(cu_seqlens_q, ("batch + 1",)),
        tree_mask_=(tree_mask, ("total_q",) if packed else ("batch", "seqlen_q")),
    )
    device = k_cache.device
    checks.check_backend("k_cache", k_cache)
    checks.check_int32("cache_seqlens", cache_seqlens, ("batch",), device)
    batch = cache_seqlens.shape[0]
    if cu_seqlens_q is not None:
        checks.check_int32("cu_seqlens_q", cu_seqlens_q, ("batch + 1",), device)
        checks.check_size("cu_seqlens_q", cu_seqlens_q, 0, "batch + 1", batch + 1, "see lengths")
    if block_table is not None:
        checks.check_int32("block_table", block_table, ("batch", "max_pages_per_seq"), device)
        checks.check_size("block_table", block_table, 0, "batch", batch, "as cache_seqlens has")
        if k_cache.shape[1] < 1:
            raise ValueError(
                f"k_cache must have page_size of at least 1; got {checks.shape_text(k_cache)}"
            )
        width = block_table.shape[1]
    else:
        checks.check_size("k_cache", k_cache, 0, "batch", batch, "as cache_seqlens has")
        width = 1
    if max_seqlen_q is not None:
        longest_q = checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    elif packed:
        raise ValueError(
            "max_seqlen_q must be given with cu_seqlens_q: the most queries of one sequence, 1 in "
            "decode; got None"
        )
    else:
        longest_q = 1 if tree_mask is None else tree_mask.shape[1]
    if tree_mask is not None:
        if tree_mask.dtype != torch.int64:
            raise TypeError(f"tree_mask must have dtype torch.int64; got {tree_mask.dtype}")
        checks.check_device("tree_mask", tree_mask, device)
        if not torch.compiler.is_compiling() and longest_q > MAX_DRAFT_TOKENS:
            raise ValueError(
                f"max_seqlen_q must be at most {MAX_DRAFT_TOKENS} with tree_mask; got {longest_q}"
            )
    capacity = checks.within_int32(width * k_cache.shape[1])
    longest_k = capacity
    if max_seqlen_k is not None:
        longest_k = min(checks.check_max_seqlen("max_seqlen_k", max_seqlen_k), capacity)
    plan = KVCachePlan(
        cache_seqlens,
        block_table,
        cu_seqlens_q,
        tree_mask,
        longest_q,
        longest_k,
        checks.check_num_splits(num_splits),
        (k_cache.shape[0], k_cache.shape[1]),
        appends,
    )
    _check_values({name: getattr(plan, name) for name in NAMES}, plan)
    return plan


def _check_values(tensors: dict[str, Tensor | None], plan: KVCachePlan) -> None:
    """Those that the host can read; what depends on a layer's window, its call looks at."""
    lengths, cu_seqlens_q = tensors["cache_seqlens"], tensors["cu_seqlens_q"]
    if lengths is None or not cache_checks.can_read_values(lengths):
        return
    new = [plan.max_seqlen_q if cu_seqlens_q is None else 0] * lengths.shape[0]
    if cu_seqlens_q is not None and cache_checks.can_read_values(cu_seqlens_q):
        starts = cu_seqlens_q.tolist()
        new = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        if starts[0] != 0 or min(new, default=0) < 0:
            raise ValueError(f"cu_seqlens_q must start at 0 and never fall; got {starts}")
        if max(new, default=0) > plan.max_seqlen_q:
            raise ValueError(
                f"max_seqlen_q must be at least the longest sequence; got {plan.max_seqlen_q}, but "
                f"cu_seqlens_q has one of {max(new)} queries"
            )
    if not plan.appends or cu_seqlens_q is None:
        new = [0] * len(new)  # dense: a call may append fewer keys than max_seqlen_q
    for b, (length, count) in enumerate(zip(lengths.tolist(), new, strict=True)):
        if not 0 <= length <= plan.max_seqlen_k - count:
            raise ValueError(
                f"cache_seqlens[{b}] must be from 0 to {plan.max_seqlen_k - count}: a sequence has "
                f"at most {plan.max_seqlen_k} keys (max_seqlen_k, or what the cache has room for), "
                f"{count} new ones among them; got {length}"
            )


REPLACED = (
    "cache_seqlens", "block_table", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "tree_mask",
    "num_splits",
)  # fmt: skip


def check_plan(plan: Any, k_cache: Any, appends: bool, given: tuple[Any, ...]) -> None:
    """A call's plan; given: REPLACED, the arguments that it stands in the place of."""
    if not isinstance(plan, KVCachePlan):
        raise TypeError(
            f"plan must be what plan_kvcache returned, or None; got {type(plan).__name__}"
        )
    if given.count(None) < len(REPLACED):
        name, value = next(pair for pair in zip(REPLACED, given) if pair[1] is not None)
        raise ValueError(f"{name} must not be given with plan, which has it; got {value!r}")
    if appends is not plan.appends:
        what = "be given with" if plan.appends else "be None with"
        raise ValueError(f"k and v must {what} a plan that was made with appends={plan.appends}")
    if not isinstance(k_cache, Tensor) or k_cache.shape[:2] != plan.page_shape:
        checks.check_tensor("k_cache", k_cache, cache_checks.K_CACHE)
        raise ValueError(
            f"k_cache must begin with (num_pages, page_size) = {plan.page_shape}, which plan was "
            f"made for; got shape {checks.shape_text(k_cache)}"
        )
