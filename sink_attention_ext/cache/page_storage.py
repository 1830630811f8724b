"""The device memory of one group of layers in a paged cache: keys, values, scales, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupStats:
    """The pages of one group of layers."""

    window_left: int  # -1: full layers
    num_layers: int
    num_pages: int
    num_free_pages: int
    num_shared_pages: int  # held by more than one sequence
    page_bytes: int  # of one page in all layers of the group: keys, values, scales

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - self.num_free_pages

    @property
    def used_bytes(self) -> int:
        return self.num_used_pages * self.page_bytes


class PageStorage:
    """Tensors (num_layers, num_pages, page_size, num_heads_kv, head_dim[_v]); scales of each token
    and head, where there are any, without the last dimension.

    All layers of a group have their pages at the same places, so that they share block tables.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads_kv: int,
        head_dim: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device | str,
        has_scales: bool,
    ) -> None:
        rows = (num_layers, num_pages, page_size, num_heads_kv)
        self.k_cache = torch.empty(*rows, head_dim, dtype=dtype, device=device)
        self.v_cache = torch.empty(*rows, head_dim_v, dtype=dtype, device=device)
        self.k_scale = self.v_scale = None
        if has_scales:
            self.k_scale = torch.empty(rows, dtype=torch.float32, device=device)
            self.v_scale = torch.empty(rows, dtype=torch.float32, device=device)
        self.make_views()

    def make_views(self) -> None:
        """Views of each layer's tensors: keys, values, scales of both or None."""
        scales: tuple[Any, Any] = (self.k_scale, self.v_scale)
        self.layers = [
            (keys, values, *(None if scale is None else scale[place] for scale in scales))
            for place, (keys, values) in enumerate(zip(self.k_cache, self.v_cache, strict=True))
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Views would not be views in a copy: whoever made that makes them again."""
        return {name: value for name, value in self.__dict__.items() if name != "layers"}

    def _tensors(self) -> Iterator[Tensor]:
        for tensor in (self.k_cache, self.v_cache, self.k_scale, self.v_scale):
            if tensor is not None:
                yield tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copies page `source` to page `target` for each (source, target), in every layer.

        No source is a target: sources are held, targets were free. It takes no further memory, so
        it cannot fail half-way.
        """
        for source, target in copies:
            for tensor in self._tensors():
                tensor[:, target].copy_(tensor[:, source], non_blocking=True)


def bytes_per_page(
    page_size: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    has_scales: bool,
) -> int:
    """Of one layer, keys and values."""
    bytes_per_head = (head_dim + head_dim_v) * dtype.itemsize + (8 if has_scales else 0)
    return page_size * num_heads_kv * bytes_per_head


def clone_inference_tensors(owner: Any) -> None:
    """In the place of the attributes that inference mode made and that could not be written outside
    of it."""

    def normal(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if value.is_inference() else value
        return [normal(item) for item in value] if isinstance(value, list) else value

    with torch.inference_mode(False):
        for name, value in vars(owner).items():
            setattr(owner, name, normal(value))
