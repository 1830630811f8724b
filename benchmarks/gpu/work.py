"""What a call has to compute: for TFLOP/s."""

from __future__ import annotations

FORWARD_PRODUCTS = 2  # Q K^T, P V
ALL_PRODUCTS = 7  # and of the backward: Q K^T again, dO V^T, P^T dO, dS^T Q, dS K


def visible_pairs(seqlen: int, window: int | None) -> int:
    """(query, key) pairs of a causal layer; a window counts the query's own token."""
    window = seqlen if window is None else min(window, seqlen)
    return window * (window + 1) // 2 + (seqlen - window) * window


def flops(seqlen: int, num_heads_q: int, head_dim: int, window: int | None, direction: str) -> int:
    """Multiplications and additions of the products alone, over visible pairs."""
    products = ALL_PRODUCTS if direction == "forward+backward" else FORWARD_PRODUCTS
    return 2 * products * num_heads_q * head_dim * visible_pairs(seqlen, window)
