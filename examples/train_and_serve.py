"""Trains a small GPT-OSS with sink attention, checks it against transformers' eager code, serves it.

    python examples/train_and_serve.py          (or: make demo)

No network, no GPU; about three minutes on two cores. Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_gpt_oss import measure, model, picture, serve, shares, text, train  # noqa: E402

LOGIT_TOLERANCE = 1e-3  # float32, logits of about 10
PICTURE = Path(__file__).parents[1] / "build" / "demo" / "train_and_serve.png"

PROMPTS = (
    "The ",
    "A class ",
    "If the object",
    "Comparison operators ",
    "The following statement ",
    "When a function is called, ",
    "An exception is raised when the ",
)
NUM_LONG = 1  # and so many prompts cut out of the held-out text, longer than a window
LONG_PROMPT = 500

failures: list[str] = []


def check(passed: bool, claim: str) -> None:
    print(f"  {'ok  ' if passed else 'FAIL'}  {claim}")
    if not passed:
        failures.append(claim)


def show_training(net: torch.nn.Module, losses: list[float], held_out: float, tokens: int) -> None:
    first, last = losses[0], sum(losses[-20:]) / len(losses[-20:])
    check(
        last < 0.5 * first and held_out < 0.6 * first,
        f"loss fell from {first:.2f} to {last:.2f} nats per byte "
        f"({held_out:.2f} on text it never saw) in {tokens / 1e6:.1f}M bytes",
    )
    sinks = model.sinks(net)
    check(
        bool((sinks != 0).all()),
        f"each of the {sinks.numel()} sinks moved from 0: now {sinks.min():.2f} to {sinks.max():.2f}",
    )


def compare_with_eager(net: torch.nn.Module, held_out: torch.Tensor) -> None:
    ids = held_out[None, :1024]
    logits = []
    with torch.no_grad():
        for name in (model.OURS, "eager"):
            net.set_attn_implementation(name)
            logits.append(net(ids, use_cache=False).logits)
    net.set_attn_implementation(model.OURS)
    difference = (logits[0] - logits[1]).abs().max().item()
    check(
        difference <= LOGIT_TOLERANCE,
        f"logits are transformers' eager ones to within {difference:.0e} (allowed {LOGIT_TOLERANCE:.0e})",
    )
    ours, eager = measure.measure(model.OURS), measure.measure("eager")
    print(f"  one training step on {measure.SEQLEN} bytes, each in a process of its own:")
    for name, result in (("sink_attention", ours), ("eager", eager)):
        print(f"    {name:<16}{result['seconds']:6.2f} s {result['bytes'] / 2**20:8.0f} MiB peak")
    check(
        ours["bytes"] < eager["bytes"],
        f"that is {eager['seconds'] / ours['seconds']:.1f} times as fast in "
        f"{ours['bytes'] / eager['bytes']:.0%} of the memory",
    )


def serve_prompts(net: torch.nn.Module, held_out: torch.Tensor, new_tokens: int) -> None:
    long = [held_out[i * 900 :][:LONG_PROMPT].tolist() for i in range(NUM_LONG)]
    prompts = [text.encode(p) for p in PROMPTS] + [[text.BOS, *p] for p in long]
    answers, paged_rate = serve.serve_paged(net, prompts, new_tokens)
    for prompt, answer in zip(prompts, answers, strict=True):
        start, rest = text.decode(prompt), text.decode(answer)
        shown = " ".join((("..." + start[-30:]) if len(start) > 40 else start).split()) + " | "
        print(textwrap.shorten(f"  {len(prompt):4d} bytes: {shown}{rest}", 96, placeholder=" ..."))
    one_by_one, batched = serve.serve_eager(net, prompts, new_tokens)
    print(
        f"  new bytes per second: {paged_rate:.0f} paged, continuous; eager generate {one_by_one:.0f} one by "
        f"one, {batched:.0f} in one padded batch"
    )
    worst = serve.worst_choice(net, prompts, answers)
    check(
        worst <= LOGIT_TOLERANCE,
        f"each byte served is eager's own greedy choice (to within {worst:.0e} in its logit)",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=360, help="training steps")
    parser.add_argument("--seconds", type=float, default=110, help="training ends after so many")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=120, help="served for each prompt")
    options = parser.parse_args()
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    training, held_out = text.load()
    net = model.build()
    config = net.config
    print(
        f"A GPT-OSS with {net.num_parameters() / 1e6:.1f}M parameters: {config.num_hidden_layers} layers "
        f"(sliding over {config.sliding_window} bytes, full, in turn), {config.num_attention_heads} query "
        f"and {config.num_key_value_heads} kv heads,\na learnable sink in each head. Text: "
        f"{len(training) / 1e3:.0f} kB of English that ships with Python.\n"
    )
    print("1. Train it with sink_attention")
    losses = train.train(
        net, training, options.steps, options.seconds, options.batch_size, options.seqlen
    )
    tokens = len(losses) * options.batch_size * options.seqlen
    show_training(net, losses, train.held_out_loss(net, held_out, options.seqlen), tokens)

    print("2. Compare with transformers' eager attention")
    compare_with_eager(net, held_out)

    print("3. Serve eight prompts at once from a paged cache")
    serve_prompts(net, held_out, options.new_tokens)

    print("4. Look at the sinks")
    net.set_attn_implementation(model.OURS)
    taken = shares.sink_shares(net, held_out[None, :2048])
    picture.draw(PICTURE, losses, model.sinks(net), taken, config.layer_types)
    head = int(taken.argmax())
    layer, head = divmod(head, config.num_attention_heads)
    print(
        f"  the sinks take {taken.mean():.0%} of all attention, most in layer {layer}, head {head}: "
        f"{taken.max():.0%}\n  picture: {os.path.relpath(PICTURE)}"
    )
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\n{'FAILED' if failures else 'All checks passed'} in {minutes}:{seconds:02d} minutes.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
