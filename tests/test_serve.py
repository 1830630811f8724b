"""`transformers serve` on our operators: concurrent streaming chat requests against generate()."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

for package in ("fastapi", "uvicorn", "openai", "kernels"):
    pytest.importorskip(package, reason=f"needs {package}: python tools/install_missing.py serve")

from tiny_models import VOCAB, gpt_oss, tokens  # noqa: E402
from tokenizers import Tokenizer, decoders, models  # noqa: E402
from transformers import GenerationConfig, PreTrainedTokenizerFast  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
from chat_server import CACHE, Answer, ChatServer, ask, ask_all, save  # noqa: E402

from sink_attention_ext.integrations.flash_attention_3 import local_kernels  # noqa: E402

NEW_TOKENS = 24
# Longer than the window of 16, longer than a pass of the scheduler (64 tokens), a single token, ...
LENGTHS = (37, 9, 23, 1, 70, 16, 17, 5)
TIME_LIMIT = 180  # seconds, after which the server is killed


@dataclass
class Served:
    server: ChatServer
    prompts: list[str]
    expected: list[Answer]  # of generate() with transformers' eager attention


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A printable ASCII character for each token of the tiny model: the text tells every token."""
    vocab = {"<pad>": 0, "<s>": 1} | {chr(30 + token): token for token in range(2, VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["--continuous-batching", *CACHE], id="continuous batching"),
        pytest.param([], id="one at a time", marks=pytest.mark.slow),
    ],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model, tokenizer = gpt_oss(), character_tokenizer()
    model.set_attn_implementation("eager")
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    prompts, expected = [], []
    for length in LENGTHS:
        ids = tokens(1, length, seed=length)
        prompts.append(tokenizer.decode(ids[0]))
        answer = model.generate(ids, greedy, attention_mask=torch.ones_like(ids))[0, length:]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        expected.append(Answer(text, len(answer), "length"))
    said = set("".join(answer.text for answer in expected))
    assert len(said) > 15  # no model that says one thing all the time
    folder = tmp_path_factory.mktemp("model")
    save(model, tokenizer, folder)
    with ChatServer(folder, request.param, TIME_LIMIT) as server:
        yield Served(server, prompts, expected)
    assert server.process.poll() is not None
    assert not server.answers()


def test_concurrent_streams_are_those_of_generate(served: Served) -> None:
    arrived: list[int] = []
    answers = ask_all(
        served.server, served.prompts, NEW_TOKENS, lambda index, text: arrived.append(index)
    )
    assert answers == served.expected
    assert len(arrived) > 0.9 * NEW_TOKENS * len(LENGTHS)  # token by token, not as one text
    in_batches = "--continuous-batching" in served.server.command
    assert served.server.printed().count(f"CB: {in_batches}\n") == len(LENGTHS)


def test_the_server_computes_with_our_library(served: Served) -> None:
    maps = Path(f"/proc/{served.server.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see what a process has loaded")
    assert "sink_attention_ext/_C.abi3.so" in maps.read_text()


def test_a_second_turn(served: Served) -> None:
    """The same server afterwards, with one request alone."""
    answer = ask(served.server, served.prompts[0], 5)
    assert answer == Answer(served.expected[0].text[:5], 5, "length")


def test_serve_demo(tmp_path: Path) -> None:
    """`make serve-demo`, with a few steps of everything."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "serve_demo.py", "--quick"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,  # it depends on no working directory
        capture_output=True,
        text=True,
        timeout=2 * TIME_LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "  ok: all 8 answers are those of generate()"
    assert all(f" s  [{index}] " in done.stdout for index in range(1, 9))
    assert "tokens/s" in done.stdout and "Traceback" not in done.stderr


def sleeper(tmp_path: Path, code: str) -> ChatServer:
    server = ChatServer(tmp_path)
    server.command = [sys.executable, "-c", code]
    server.answers = lambda: "ready" in server.printed()  # type: ignore[method-assign]
    return server


def test_who_stops_second_waits_until_the_server_is_gone(tmp_path: Path) -> None:
    """As a watchdog whose time is up while the block ends: SIGTERM is taken its time for."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with sleeper(tmp_path, code) as server:
        first = threading.Thread(target=server.stop)
        first.start()
        while not server.stopping.locked():
            time.sleep(0.01)
        server.stop()
        assert server.process.returncode is not None
        first.join()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_the_server_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'examples'), str(ROOT / 'tests')]}\n"
        "import os, signal\n"
        "from pathlib import Path\n"
        "from test_serve import sleeper\n"
        f"code = \"print('ready', flush=True); import time; time.sleep(60)\"\n"
        f"with sleeper(Path({str(tmp_path)!r}), code) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    status = Path(f"/proc/{int(done.stdout)}/status")
    for _ in range(500):  # at most 5 seconds; it would sleep for a minute
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    pytest.fail("the server is still there")


def test_a_users_own_local_kernels_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", "someone/kernel=/a")
    assert ChatServer(tmp_path).environment()["LOCAL_KERNELS"] == (
        f"someone/kernel=/a:{local_kernels()}"
    )
    monkeypatch.delenv("LOCAL_KERNELS")
    assert ChatServer(tmp_path).environment()["LOCAL_KERNELS"] == local_kernels()


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start:(.|\n)*no model"):
        ChatServer(tmp_path / "no model", time_limit=60).__enter__()
