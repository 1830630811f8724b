"""Runs a function in several processes of a gloo group, as GPUs that share a model would."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(minutes=2)  # of a rank whose message does not come; then it is an error


def _run(
    rank: int, world_size: int, function: Callable[..., None], port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=PATIENCE)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
    # Without taking the interpreter apart: a thread that the communication library has still
    # running then would end the process by SIGABRT, after all went well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """function(rank, *args) of a module's top level on each of `world_size` ranks, one thread each.

    An error on a rank is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, (world_size, function, port, args), nprocs=world_size, join=True)


def on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    on_ranks(2, function, *args)
