"""What every mask object is: a description of what is visible, that is no tensor and says so."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class NotATensorError(AttributeError, TypeError):
    """A model reads or changes its attention_mask as the tensor which it is not.

    A TypeError to users. An AttributeError too, so that hasattr() and getattr() with a default work
    as on any other object.
    """


class AttentionMask:
    """Common part: the shape it was made for, and what is visible beside the bounds of the keys.

    A plain class, neither a tensor nor a dataclass: wrappers that cast or rebuild a module's
    inputs (FSDP, DDP) leave it alone. It offers the methods that transformers and accelerate call
    on masks. Models that handle masks themselves (they slice, add or fill by them) are refused.
    """

    ndim = 4  # tells transformers that this is no 2D padding mask any more

    def __init__(
        self, q_length: int, kv_length: int, causal: bool, window_size: tuple[int, int]
    ) -> None:
        self.q_length = q_length
        self.kv_length = kv_length
        self.causal = causal
        self.window_size = window_size  # (left, right) as in flash_attn_func, -1: unbounded

    def contiguous(self) -> AttentionMask:
        return self

    def to(self, device: Any = None, non_blocking: bool = False, **cast: Any) -> AttentionMask:
        """The same mask with its tensors on `device` (layers of one model on several devices)."""
        if device is None or isinstance(device, (torch.dtype, Tensor)) or cast:
            raise _not_a_tensor(self, "attention_mask.to(dtype)")
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device=device, non_blocking=non_blocking))
        return moved

    def check(self, q: Tensor, k: Tensor, module: nn.Module) -> None:
        if q.shape[2] != self.q_length or k.shape[2] != self.kv_length:
            raise ValueError(
                f"sink_attention's attention_mask was made for {self.q_length} queries and "
                f"{self.kv_length} keys; got query {tuple(q.shape)} and key {tuple(k.shape)} in "
                f"{type(module).__name__}: a layer that adds keys of its own (compressed ones, for "
                "example) needs a mask tensor: use attn_implementation='eager'"
            )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, deterministic: bool, options: dict[str, Any]
    ) -> Tensor:
        """Attention under this mask; `options` are softmax_scale, softcap and s_aux."""
        raise NotImplementedError

    def _visible(self) -> dict[str, Any]:
        return {"causal": self.causal, "window_size": self.window_size}

    def __getattr__(self, name: str) -> NoReturn:  # only what is not there
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_a_tensor(self, f"attention_mask.{name}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise _not_a_tensor(cls, f"{getattr(function, '__name__', function)}(..., attention_mask)")

    def __bool__(self) -> bool:
        return True  # "is there a mask", as of any object; __len__ is refused

    __hash__ = object.__hash__  # beside the comparisons, which are refused below


def _not_a_tensor(mask: Any, use: str) -> NotATensorError:
    kind = mask if isinstance(mask, type) else type(mask)
    return NotATensorError(
        f"this model handles attention_mask as a tensor ({use}), but sink_attention's mask is none "
        f"(it is {kind.__name__}, which says what is visible): use attn_implementation='eager'"
    )


def _refuse_operator(name: str) -> Any:
    def operator(self: AttentionMask, *args: Any) -> NoReturn:
        raise _not_a_tensor(self, name)

    operator.__name__ = name
    return operator


_OPERATORS = (
    *("getitem", "setitem", "len", "iter", "invert", "neg", "abs", "float", "int"),
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv"),
    *("and", "rand", "iand", "or", "ror", "ior", "xor", "rxor", "matmul", "rmatmul", "pow"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)
for _name in _OPERATORS:
    setattr(AttentionMask, f"__{_name}__", _refuse_operator(f"__{_name}__"))
