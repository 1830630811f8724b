"""Capturing calls in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


def captured(call: Callable[[], Results]) -> Callable[[], Results]:
    """A function that replays `call` and returns what it left."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for a few calls outside of the graph first
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Results:
        graph.replay()
        return tuple(result.clone() for result in results)

    return replay
