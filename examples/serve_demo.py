"""Trains a small GPT-OSS model, serves it with `transformers serve`, asks it eight things at once:
`make serve-demo`.

1. train  a byte-level model on the text of Python's help(), about a minute
2. serve  the unmodified server, with continuous batching; its attention is this package's
3. ask    eight streaming chat requests from as many OpenAI clients, printed as they arrive

The exit status is 0 only if each answer is that of generate() with HuggingFace's eager attention.
--quick takes a few steps of everything.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import small_model as small
import torch
import transformers
from chat_server import CACHE, Answer, ChatServer, ask, ask_all, byte_tokenizer, save
from serve import PROMPTS
from transformers import GenerationConfig, GptOssForCausalLM, PreTrainedTokenizerFast

PIECE = 20  # characters of one answer that are printed together


class Transcript:
    """Prints what arrives, some characters of one request at a time."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.lock = threading.Lock()
        self.waiting: dict[int, str] = {}

    def __call__(self, index: int, text: str) -> None:
        with self.lock:
            self.waiting[index] = self.waiting.get(index, "") + text
            if len(self.waiting[index]) >= PIECE:
                self.flush(index)

    def flush(self, index: int) -> None:
        seconds = time.perf_counter() - self.start
        print(f"  {seconds:6.2f} s  [{index + 1}] {self.waiting.pop(index)!r}", flush=True)

    def flush_all(self) -> None:
        for index in sorted(self.waiting):
            self.flush(index)


def generate(
    model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int
) -> Answer:
    """The same answer by plain generate(): greedy, HuggingFace's eager attention, one prompt."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([small.encode(prompt)])
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=small.PAD,
        eos_token_id=small.END,
    )
    tokens = model.generate(ids, config, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
    reason = "length" if len(tokens) == new_tokens else "stop"
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), reason)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=350, help="training steps (350)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    args = parser.parse_args()
    # An exception, so that the server goes with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    steps, new_tokens = (8, 16) if args.quick else (args.steps, 96)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    print("1. Train", flush=True)
    model, tokenizer = small.make_model(), byte_tokenizer(small.PAD, small.END)
    losses = small.train(model, small.load_text()[0], steps)
    print(f"  loss {losses[0]:.2f} in the first step, {small.smooth(losses)[-1]:.2f} at the end")
    expected = [generate(model, tokenizer, prompt, new_tokens) for prompt in PROMPTS]

    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, Path(folder))
        print("\n2. Serve", flush=True)
        with ChatServer(Path(folder), ["--continuous-batching", *CACHE]) as server:
            print("  " + " ".join(server.command[2:]))
            ask(server, PROMPTS[0], 2)  # warm up
            print("\n3. Ask: seconds, [request], what arrived", flush=True)
            transcript = Transcript()
            start = time.perf_counter()
            answers = ask_all(server, PROMPTS, new_tokens, transcript)
            seconds = time.perf_counter() - start
            transcript.flush_all()

    print()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        print(f"  [{i + 1}] {prompt!r}\n      {answer.text!r}")
    total = sum(answer.num_tokens for answer in answers)
    print(f"\n  {total} tokens in {seconds:.2f} s: {total / seconds:.0f} tokens/s")
    wrong = [i + 1 for i in range(len(PROMPTS)) if answers[i] != expected[i]]
    for i in wrong:
        print(f"  FAILED [{i}]: generate() says {expected[i - 1]}, the server {answers[i - 1]}")
    if not wrong:
        print(f"  ok: all {len(PROMPTS)} answers are those of generate()")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
