"""What can run here, what does not and why, and how an operation chooses its implementation.

Every operation (``patch_embed``, ``layer_norm``, ``linear``, ``attention``) has several implementations with one meaning:

==============  ===============================================================================
``reference``   the formula, step by step, as jeonsworld/ViT-pytorch computes it
``torch``       the best composition of stock PyTorch; the fallback, and the yardstick
``triton``      the Triton kernels of ``kernels/``, for GPUs
``cpp``         the compiled extension of ``csrc/``
==============  ===============================================================================

``auto``, the default, takes the one that was measured fastest on this machine (`vit_fast.tuning`); where nobody measured, the
first one, in the order that the operation's file states, that supports the given inputs and is worth taking. A named
implementation never falls back: it computes, or it says why it can't.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_fast import tuning

NAMES = ("reference", "torch", "triton", "cpp")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. Both callables take the operation's arguments, in its order.

    ``run`` computes, autograd included. ``supports`` returns None, or the reason why it can't take these inputs. ``worth``
    returns None, or the reason why ``auto`` leaves it out, though it could, where nothing was measured.
    """

    run: Callable
    supports: Callable[..., str | None]
    worth: Callable[..., str | None] = lambda *args: None


class Operation:
    """An operation's table of implementations; calling it runs the chosen one."""

    def __init__(self, name: str, implementations: dict[str, Implementation], order: tuple[str, ...]):
        self.name = name
        self.implementations = implementations
        self.order = order  # what `auto` tries, best first
        OPERATIONS[name] = self

    def __call__(self, *args):
        return self.implementations[self.choose(*args)].run(*args)

    def choose(self, *args) -> str:
        """The name of the implementation that a call with these arguments runs. RuntimeError if the one asked for can't."""
        if _selected != "auto":
            reason = self.reason_against(_selected, *args)
            if reason is not None:
                raise RuntimeError(f"{self.name}: implementation '{_selected}' cannot run: {reason}")
            return _selected
        measured = tuning.choice(self.name, args)
        if measured in self.implementations and self.implementations[measured].supports(*args) is None:
            return measured
        for name in self.order:
            # The interpreter is for tests: hundreds of times slower than anything else.
            if name == "triton" and interpreting():
                continue
            if self.reason_against(name, *args) is None:
                return name
        return "torch"

    def reason_against(self, name: str, *args) -> str | None:
        """Why the implementation of that name can't take these arguments, or `auto` leaves it out; None when it can."""
        if name not in self.implementations:
            return f"{self.name} has no such implementation (it has {', '.join(self.implementations)})"
        implementation = self.implementations[name]
        reason = implementation.supports(*args)
        return implementation.worth(*args) if reason is None and _selected == "auto" else reason


OPERATIONS: dict[str, Operation] = {}


def anything(*args) -> None:
    """``supports`` of the implementations made of stock PyTorch: whatever passed the operation's own checks."""
    return None


# ---- Selecting ------------------------------------------------------------------------------------------------------


def _checked(name: str, where: str = "") -> str:
    if name not in (*NAMES, "auto"):
        raise ValueError(f"{where}unknown implementation {name!r}: choose one of {', '.join((*NAMES, 'auto'))}")
    return name


# A plain module global, not a ContextVar: torch.compile guards on it, so a compiled model recompiles when it changes.
_selected = _checked(os.environ.get("VIT_FAST_IMPL", "auto"), "environment variable VIT_FAST_IMPL: ")


def selected() -> str:
    """The implementation in force: one of `NAMES`, or ``auto``."""
    return _selected


class use:
    """Select the implementation of every operation, for the process: ``use("torch")``, or ``with use("torch"): …``.

    Called plainly it stays in force; as a context manager it restores what was there before. ValueError for an unknown name.
    The environment variable ``VIT_FAST_IMPL`` sets the first selection.
    """

    def __init__(self, name: str):
        global _selected
        self._before, _selected = _selected, _checked(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info) -> None:
        global _selected
        _selected = self._before


# ---- What runs here -------------------------------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return _INTERPRET


_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read once, as Triton does when a kernel is defined


# Computed at import, and the rest from what torch.compile treats as constant: these functions run while it traces.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_architectures: dict[int | None, int] = {}  # of each CUDA device: 90 for compute capability 9.0


def triton_missing() -> str | None:
    """Why no Triton kernel can run in this process; None when they can."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if not _INTERPRET and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def triton_refuses(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels can't take these tensors, as far as device and dtype go; None when they can."""
    if torch._C._are_functorch_transforms_active():  # what is passed then are wrappers, or derivatives are taken twice
        return "inside torch.func transforms only stock operations can run"
    for tensor in tensors:
        if tensor is None:
            continue
        device = tensor.device
        if device.type == "cuda":
            if not _TRITON_INSTALLED or _architecture(device.index) < 80:
                return triton_missing() or "it needs compute capability 8.0 or newer"
        elif not (_INTERPRET and device.type == "cpu"):
            return triton_missing() or f"it needs CUDA tensors, got one on {device}"
        if tensor.dtype not in _TRITON_DTYPES:
            return f"it takes float32, float16 and bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _architecture(index: int | None) -> int:
    if index not in _architectures:
        properties = torch.cuda.get_device_properties(index)
        _architectures[index] = 10 * properties.major + properties.minor
    return _architectures[index]


# float64 only where the interpreter checks derivatives with it; no GPU kernel is tuned for it.
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if _INTERPRET else ())


def backends() -> dict[str, str | None]:
    """For each implementation name: None when it can run in this process, else the reason why not.

    What one operation would choose for given inputs: ``OPERATIONS[name].choose(*inputs)``; ``vit-fast info`` prints both.
    """
    from vit_fast import extension

    return {
        "reference": None,
        "torch": None,
        "triton": triton_missing(),
        "cpp": extension.missing("cpu"),
    }


class _CallableModule(types.ModuleType):
    """`vit_fast.backends()` is short for `vit_fast.backends.backends()`."""

    def __call__(self) -> dict[str, str | None]:
        return backends()


sys.modules[__name__].__class__ = _CallableModule
