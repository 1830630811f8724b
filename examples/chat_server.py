"""A real `transformers serve` on our operators, as a child process, and requests to it.

The server is transformers' own command, unchanged. Its environment says that what it takes for the
hub's attention kernel lies in this package's folder:

    LOCAL_KERNELS="kernels-community/vllm-flash-attn3=$(python -m sink_attention_ext kernel-path)"
    transformers serve MODEL --attn-implementation kernels-community/vllm-flash-attn3 \
        --continuous-batching
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sink_attention_ext
from sink_attention_ext.integrations.flash_attention_3 import KERNEL_REPO, local_kernels

# A prompt is what the messages say, one after the other: the models here continue a text.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CACHE = ["--cb-block-size", "32", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]

# Looked up before the fork: little is safe between it and exec.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


# ---- the model's folder ----


def byte_tokenizer(pad: int, end: int) -> PreTrainedTokenizerFast:
    """A token for each byte, its value; pad and end, 256 and 257, are no bytes."""
    # tokenizers' alphabet: a printable character for each byte, its own where it is printable.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    characters = [chr(b if b in printable else next(others)) for b in range(256)]
    tokenizer = Tokenizer(models.BPE({c: b for b, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    assert (fast.pad_token_id, fast.eos_token_id) == (pad, end)
    return fast


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


# ---- the server ----


def end_with(parent: int) -> Callable[[], None] | None:
    """For the child, before exec: it is killed when its parent is gone, however that ended.

    None where the system has no such thing (other than Linux).
    """
    if LIBC is None:
        return None

    def in_the_child() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before that
            os._exit(1)

    return in_the_child


class ChatServer:
    """`transformers serve` for the model in a folder, on a free port of this machine's loopback.

    In a with statement: it answers when the block begins, and is gone when the block has ended, or
    after time_limit seconds, whatever hangs; on Linux also when this process is killed. Enter it in
    the main thread: the kernel takes the end of the thread that started the server for the end of
    the parent.

    Raises:
        RuntimeError: it did not start; the message holds what it printed.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), time_limit: float = 180) -> None:
        self.model = str(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", self.model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"),
            *("--attn-implementation", KERNEL_REPO, *options),
        ]
        self.is_stopped = False
        self.stopping = threading.Lock()
        self.watchdog = threading.Timer(time_limit, self.stop)

    def environment(self) -> dict[str, str]:
        package = str(Path(sink_attention_ext.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Of two entries for one name the last counts.
        kernels = [*filter(None, [os.environ.get("LOCAL_KERNELS")]), local_kernels()]
        return {
            # Threads that spin while they wait would take the cores from the client.
            "OMP_WAIT_POLICY": "passive",
            **os.environ,
            "LOCAL_KERNELS": ":".join(kernels),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def __enter__(self) -> ChatServer:
        # Appending, since the server shares the position at which printed() reads.
        self.log = tempfile.TemporaryFile("a+b")
        self.process = subprocess.Popen(
            self.command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, which stop() ends as a whole
            # The signal comes when the *thread* that forks here ends, hence the main thread's task.
            preexec_fn=end_with(os.getpid()),
        )
        self.watchdog.daemon = True
        self.watchdog.start()
        try:
            while not self.answers():
                if self.process.poll() is not None:
                    raise RuntimeError(f"transformers serve did not start:\n{self.printed()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.cancel()
        self.stop()
        self.log.close()

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def printed(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self) -> None:
        """Ends the whole process group. Who comes second (the watchdog) waits until it is gone."""
        with self.stopping:
            if self.is_stopped:
                return
            for kind, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)
            self.is_stopped = True  # afterwards the number may be another group's


# ---- requests ----


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int  # as the server counts them
    finish_reason: str


def ask(
    server: ChatServer,
    prompt: str,
    new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
    timeout: float = 120,
) -> Answer:
    """One greedy streaming chat request; on_text is called with each piece as it comes."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=timeout,
        http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy stands before loopback
    ) as client:
        stream = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
        )
        pieces, num_tokens, finish_reason = [], 0, ""
        for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                finish_reason = choice.finish_reason or finish_reason
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                    on_text(choice.delta.content)
    return Answer("".join(pieces), num_tokens, finish_reason)


def ask_all(
    server: ChatServer,
    prompts: Sequence[str],
    new_tokens: int,
    on_text: Callable[[int, str], None] = lambda index, text: None,
) -> list[Answer]:
    """All prompts at the same time, each from a client in a thread of its own."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        futures = [
            pool.submit(ask, server, prompt, new_tokens, lambda text, i=i: on_text(i, text))
            for i, prompt in enumerate(prompts)
        ]
        return [future.result() for future in futures]
