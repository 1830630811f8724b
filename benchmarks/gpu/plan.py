"""What the benchmarks would measure on a GPU, without one: shapes, kernels, and peers.

python -m gpu.plan [--quick]
"""

from __future__ import annotations

import argparse
import itertools

import backward
import cascade
import decode
import forward
import overhead
import torch
import window
from cases import DTYPE_NAMES, Settings
from gpu.peers import SDPA_BACKENDS, importable
from gpu.work import flops
from run import settings_of

from sink_attention_ext.support import cuda_kernel

SWEEPS = {"forward": forward, "backward": backward, "window": window}


def sweep_cases(settings: Settings) -> list[tuple[str, str, str, str, int, float]]:
    """(section, layer, dtype, direction, tokens, TFLOP of one call)."""
    cases = []
    for section, module in SWEEPS.items():
        lengths = module.lengths(settings) if section == "window" else settings.seqlens
        shapes = itertools.product(module.LAYERS, DTYPE_NAMES.values(), module.DIRECTIONS, lengths)
        for layer, dtype, with_backward, seqlen in shapes:
            direction = "forward+backward" if with_backward else "forward"
            work = flops(seqlen, layer.num_heads_q, layer.head_dim, layer.window, direction)
            cases.append((section, layer.name, dtype, direction, seqlen, work / 1e12))
    return cases


CARDS = (80, 90, 120)  # 10 * major + minor of compute capabilities


def kernels() -> list[tuple[str, str, str, str]]:
    """(call, layer, dtype, the kernels that it runs on CARDS), as the library plans them."""
    layers = dict.fromkeys(layer for module in SWEEPS.values() for layer in module.LAYERS)
    calls = {"forward": (4096, False, False), "backward": (4096, True, False)}
    calls["decode"] = (1, False, True)
    found = []
    for layer, dtype, (call, (seqlen, with_backward, paged)) in itertools.product(
        layers, DTYPE_NAMES, calls.items()
    ):
        names = [
            cuda_kernel(
                seqlen, with_backward, arch=arch, dtype=dtype, kv_dtype=dtype,
                head_dim=layer.head_dim, head_dim_v=layer.head_dim, paged=paged, tree_mask=False,
                num_heads_q=layer.num_heads_q, num_heads_kv=layer.num_heads_kv,
            )
            for arch in CARDS
        ]  # fmt: skip
        of_card = zip(CARDS, names, strict=True)
        text = ", ".join(f"{arch // 10}.{arch % 10} {name}" for arch, name in of_card)
        found.append((call, layer.name, DTYPE_NAMES[dtype], text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.device = torch.device("cuda")
    settings = settings_of(arguments)
    for section, layer, dtype, direction, seqlen, work in sweep_cases(settings):
        print(
            f"{section:<10}{layer:<20}{dtype:<6}{direction:<18}{seqlen:>6} tokens {work:8.3f} TFLOP"
        )
    batches, seqlens = decode.shapes(settings)
    for dtype, batch, seqlen in itertools.product(DTYPE_NAMES.values(), batches, seqlens):
        print(f"{'decode':<10}{dtype:<6}{batch} sequences of {seqlen} tokens")
    tokens = overhead.QUICK_SEQLEN if settings.quick else overhead.SEQLEN
    print(f"{'overhead':<10}three layers, two dtypes, both directions, {tokens} tokens")
    own = cascade.own_tokens(settings)
    print(
        f"{'cascade':<10}{cascade.BATCH} sequences on {cascade.PREFIX} tokens, {own} of their own"
    )
    print()
    for call, layer, dtype, text in kernels():
        print(f"kernel of {call:<9}{layer:<20}{dtype:<6}{text}")
    print("\npeers: SDPA of this torch:", ", ".join(SDPA_BACKENDS))
    for peer, answer in importable().items():
        print(f"peers: {peer}: {answer}")


if __name__ == "__main__":
    main()
