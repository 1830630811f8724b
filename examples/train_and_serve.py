"""Trains a small GPT-OSS model on the CPU with sink_attention_ext, then serves it: `make demo`.

1. train    byte-level GPT-OSS with learnable sinks on the text of Python's help(), a minute or two
2. compare  with HuggingFace's eager attention: logits, time and memory of a training step
3. serve    eight prompts at once from the paged cache, against eager generate()
4. picture  build/demo.png

The exit status is 1 if a result is not what it should be. --quick takes a few steps of everything.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path

import picture
import serve
import small_model as small
import torch
import transformers
from compare import logits_difference, measure_in_child
from torch import Tensor
from transformers import GptOssForCausalLM

from sink_attention_ext import ops

PICTURE = Path(__file__).resolve().parent.parent / "build" / "demo.png"
LOGITS_TOLERANCE = 1e-4  # float32, and the same sums in another order
TIE = 1e-3  # two logits nearer than this are the same to rounding


class Checks:
    """Prints each check, and remembers what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, passed: bool, what: str) -> None:
        row("ok" if passed else "FAILED", what)
        if not passed:
            self.failed.append(what)


def heading(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def row(name: str, text: str) -> None:
    print(f"  {name:10}{text}", flush=True)


def layer_name(model: GptOssForCausalLM, layer: int) -> str:
    return f"{layer} {model.config.layer_types[layer].removesuffix('_attention')}"


def train(
    model: GptOssForCausalLM,
    text: Tensor,
    held_out: Tensor,
    steps: int,
    sample_length: int,
    check: Checks,
) -> tuple[list[float], Tensor, Tensor]:
    """The loss of each step, and the sinks (layers, heads) before and after."""
    heading('1. Train with attn_implementation="sink_attention"')
    layers = range(model.config.num_hidden_layers)
    row("model", f"{model.num_parameters() / 1e6:.1f} million parameters, {len(layers)} layers:")
    row("", ", ".join(layer_name(model, i) for i in layers) + f"; window {small.WINDOW} bytes")
    row("text", f"Python's language reference, {len(text) // 1000} kB, one token a byte")
    row("batch", f"{small.BATCH} x {small.SEQLEN} bytes, {steps} steps, float32")
    row("rate", f"{small.LEARNING_RATE}; for the sinks {small.SINK_LEARNING_RATE}")

    before, untrained = small.sinks_of(model), small.held_out_loss(model, held_out)
    losses = small.train(model, text, steps)
    after, trained = small.sinks_of(model), small.held_out_loss(model, held_out)

    row("loss", f"{losses[0]:.2f} in the first step, {small.smooth(losses)[-1]:.2f} at the end")
    row("held out", f"{untrained:.2f} untrained, {trained:.2f} trained (nats per byte)")
    row("sinks", "of each head, before and after training:")
    for layer in layers:
        for name, sinks in (("before", before[layer]), ("after", after[layer])):
            label = layer_name(model, layer) if name == "before" else ""
            print(f"    {label:11}{name:7}" + "".join(f"{sink:7.2f}" for sink in sinks.tolist()))
    sample = small.sample(model, "The ", sample_length)
    row("writes", textwrap.fill(f'"{sample}..."', 90, subsequent_indent=" " * 13))
    check(trained < untrained, "the loss fell, on text that was held out too")
    moved = (after - before).abs()
    check(bool((moved > 0).all()), f"every sink moved, by {moved.mean():.2f} on average")
    return losses, before, after


def compare(model: GptOssForCausalLM, tokens: Tensor, seqlen: int, check: Checks) -> None:
    heading("2. Compare with HuggingFace's eager attention")
    difference, largest = logits_difference(model, tokens)
    eager, ours = (measure_in_child(name, seqlen) for name in ("eager", "sink_attention"))
    print(f"  a training step on one sequence of {seqlen} bytes, each in a process of its own:")
    print(f"    {'':16}{'time':>10}{'peak memory':>16}")
    for name, result in (("eager", eager), ("sink_attention", ours)):
        print(f"    {name:16}{result['seconds']:8.2f} s{result['bytes'] / 2**20:12.0f} MiB")
    faster, smaller = (eager[key] / max(ours[key], 1e-9) for key in ("seconds", "bytes"))
    print(f"    {'eager / ours':16}{faster:9.1f}x{smaller:14.1f}x")
    print("    (all layers; beside attention both run the same code)")
    check(
        difference <= LOGITS_TOLERANCE,
        f"the trained model's logits, up to {largest:.0f}, differ by at most {difference:.0e} "
        f"(allowed {LOGITS_TOLERANCE:.0e})",
    )


def run_server(model: GptOssForCausalLM, new_tokens: int, check: Checks) -> None:
    heading('3. Serve eight prompts with "paged|sink_attention"')
    prompts = serve.eight_prompts()
    serve.serve_paged(model, prompts[:1], 2)  # warm up
    ours, seconds = serve.serve_paged(model, prompts, new_tokens)
    eager, eager_seconds = serve.generate_eager(model, prompts, new_tokens)
    _, padded_seconds = serve.generate_eager_padded(model, prompts, new_tokens)

    for prompt, answer in zip(serve.PROMPTS, ours, strict=True):
        shown = f"[{prompt}]{small.decode(answer)}"
        print(textwrap.fill(shown, 92, initial_indent="  ", subsequent_indent="    "))
    lengths = [len(prompt) for prompt in prompts]
    total = sum(map(len, ours))
    print(f"\n  [prompts] of {min(lengths)} to {max(lengths)} bytes; {total} new ones, greedy:")
    for name, duration in (
        ("continuous batching, paged cache (ours)", seconds),
        ("eager generate, one prompt at a time", eager_seconds),
        ("eager generate, one padded batch", padded_seconds),
    ):
        print(f"    {name:42}{total / duration:7.0f} tokens/s")
    print("    (of a model this small, transformers' scheduler takes about half of our time)")
    same = sum(a == b for a, b in zip(ours, eager, strict=True))
    if same == len(prompts):
        check(True, f"all {total} tokens are those of eager generate")
        return
    below = serve.worst_choice(model, prompts, ours)
    check(
        below <= TIE,
        f"{same} of {len(prompts)} texts are those of eager generate; in the others each token "
        f"lies within {below:.0e} of eager's best logit (allowed: {TIE:.0e}, a tie)",
    )


def draw(
    model: GptOssForCausalLM,
    tokens: Tensor,
    path: Path,
    losses: list[float],
    before: Tensor,
    after: Tensor,
) -> None:
    heading("4. What the sinks take")
    shares = picture.sink_shares(model, tokens)
    print("  of each head's attention, mean over held-out text:")
    for layer in range(len(shares)):
        numbers = "".join(f"{share:7.1%}" for share in shares[layer].tolist())
        print(f"    {layer_name(model, layer):18}{numbers}")
    picture.draw(path, losses, before, after, shares, model.config.layer_types)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps (600)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to (build/demo.png)")
    args = parser.parse_args()
    steps, seqlen, new_tokens = (8, 256, 8) if args.quick else (args.steps, 2048, 80)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    start = time.perf_counter()
    check = Checks()
    print(f"A small GPT-OSS model, trained and served on {torch.get_num_threads()} CPU threads")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"({ops.cpu_instruction_set()} kernels, {versions})")

    text, held_out = small.load_text()
    model = small.make_model()
    losses, before, after = train(model, text, held_out, steps, 2 * new_tokens, check)
    compare(model, held_out[:512].view(2, 256), seqlen, check)
    run_server(model, new_tokens, check)
    draw(model, held_out[:1024].view(4, 256), args.picture, losses, before, after)

    print()
    row("picture", str(args.picture))
    row("source", str(Path(__file__).resolve()))
    row("time", f"{time.perf_counter() - start:.0f} s")
    if check.failed:
        print(f"\n{len(check.failed)} failed: " + "; ".join(check.failed))
        return 1
    print("\nall checks passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
