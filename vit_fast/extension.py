"""The compiled extension: two shared objects without any Python in them, built from ``csrc/`` and loaded into torch.

``libvit_fast_cpu.so`` defines every operation of ``torch.ops.vit_fast_cpp`` and computes on CPUs; ``libvit_fast_cuda.so`` adds
CUDA and is loaded only where torch has it. Both speak torch's stable ABI: one build serves every torch from 2.11 on. Neither
has to be there: why one is missing is what `missing` says and `vit-fast info` prints.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vit_fast import tuning

PATHS = {device: Path(__file__).with_name(f"libvit_fast_{device}.so") for device in ("cpu", "cuda")}


def _load() -> dict[str, str | None]:
    """For each device None when its kernels are loaded, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for device, path in PATHS.items():
        if device == "cuda" and reasons["cpu"] is not None:
            reasons[device] = reasons["cpu"]  # the operations are defined there
        elif device == "cuda" and torch.version.cuda is None:
            reasons[device] = "this torch is built without CUDA"
        elif not path.exists():
            reasons[device] = (
                f"the extension for {device} is not built (VIT_FAST_EXT={device} pip install vit_fast, from source)"
            )
        else:
            try:
                torch.ops.load_library(path)
                stale = device == "cpu" and not hasattr(torch.ops.vit_fast_cpp, "epilogue_bwd")
                reasons[device] = "the extension is older than the package: build it again" if stale else None
            except OSError as error:  # of another machine, or damaged
                reasons[device] = f"the extension does not load: {error.__cause__ or error}"
    return reasons


# At import: what torch.compile traces later must be constant, and a lookup in a dictionary is.
_MISSING = _load()


def missing(device: str) -> str | None:
    """Why no kernel of the extension runs on that type of device; None when they do."""
    return _MISSING.get(device, f"the extension has no kernels for {device}")


# What the kernels of a device compute in.
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def refuses(first: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why the extension can't take these tensors, as far as device and dtype go; None when it can."""
    if torch._C._are_functorch_transforms_active():
        return "inside torch.func transforms only stock operations can run"
    reason = missing(first.device.type)
    if reason is not None:
        return reason
    for tensor in (first, *others):
        if tensor is not None and (reason := refuses_dtype(first.device, tensor.dtype)):
            return reason
    return None


def refuses_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of that device can't compute in that dtype; None when they can."""
    if dtype in DTYPES[device.type]:
        return None
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[device.type])
    return f"on {device.type} it takes {names}, got {str(dtype).removeprefix('torch.')}"


def product_not_worth(dtype: torch.dtype) -> str | None:
    """The same for a product: the extension multiplies bfloat16 in float32, at half the speed of a CPU's own instructions for
    it (B/16 on an AMD EPYC (Zen 5), 2 threads, torch 2.13, 2026-11-25).
    """
    if dtype == torch.bfloat16 and tuning.cpu_multiplies_bfloat16():
        return "under 'auto' this processor's own products of bfloat16 are taken"
    return None


def not_worth(first: torch.Tensor, *others) -> str | None:
    """Why `auto` leaves the extension out where nothing was measured; None where it takes it. By the first argument."""
    if first.device.type != "cpu":
        return "under 'auto' it serves CPUs only: nobody has timed it on a GPU"
    if torch.compiler.is_compiling():
        return "under 'auto' torch.compile gets stock operations, which it can fuse"
    return None


def instruction_set(name: str = "") -> str:
    """The instruction set of the CPU kernels in force: ``avx512``, ``avx2`` or ``portable``; with a name, after choosing it.

    ``"auto"`` is the best that the processor has, in force from the start. RuntimeError for one that it lacks, or without the
    extension. For the process, as `vit_fast.use` is.
    """
    if _MISSING["cpu"] is not None:
        raise RuntimeError(f"instruction_set: {_MISSING['cpu']}")
    return torch.ops.vit_fast_cpp.instruction_set(name)


def register_fakes(**fakes) -> None:
    """Register fakes for the kernels' boundary: Triton's operations, and the extension's, which have the same schemas."""
    for name, fake in fakes.items():
        torch.library.register_fake(f"vit_fast::{name}", fake)
        if _MISSING["cpu"] is None:
            torch.library.register_fake(f"vit_fast_cpp::{name}", fake)
