"""What every kernel file shares: the device's limits, the launch on the tensor's own device, the product."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vit_fast.kernels import launches


@dataclass(frozen=True)
class Target:
    """What launch choices may depend on."""

    backend: str  # "cuda" or "hip"
    arch: int | str  # 80, 86, 89, 90, 100, 120; "gfx942", "gfx950"
    multiprocessors: int
    shared_memory: int  # bytes that one program may take


# Shared memory one block may opt in to, per architecture (CUDA C++ Programming Guide, technical specifications; AMD: LDS of a
# compute unit), and the multiprocessors of the card that an untuned device of that architecture is taken for.
TARGETS = {
    80: Target("cuda", 80, 108, 163 * 1024),
    86: Target("cuda", 86, 84, 99 * 1024),
    89: Target("cuda", 89, 128, 99 * 1024),
    90: Target("cuda", 90, 132, 227 * 1024),
    100: Target("cuda", 100, 148, 227 * 1024),
    120: Target("cuda", 120, 170, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 304, 64 * 1024),
    "gfx950": Target("hip", "gfx950", 256, 160 * 1024),
}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device. The interpreter's (CPU tensors) is an sm_80, the most restrictive with full features."""
    if device.type != "cuda":
        return TARGETS[80]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
        known = TARGETS.get(arch, TARGETS["gfx942"])
        return Target("hip", arch, properties.multi_processor_count, known.shared_memory)
    arch = 10 * properties.major + properties.minor
    limit = properties.shared_memory_per_block_optin
    return Target("cuda", arch, properties.multi_processor_count, limit)


def tuned(function):
    """A launch choice that gives way to what was measured best on this machine for the same arguments, see `launches`."""
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    @functools.wraps(function)
    def choose(*arguments):
        config = function(*arguments)
        found = launches.get((name, *launch_arguments(arguments))) if launches else None
        if found is None:
            return config
        if isinstance(config, dict):
            return config | found
        return type(config)(*found) if hasattr(config, "_fields") else tuple(found)

    return choose


def launch_arguments(arguments: tuple) -> tuple:
    """The arguments of a launch choice as a file can hold them."""
    plain = {Target: lambda a: f"{a.arch}, {a.multiprocessors} multiprocessors", torch.dtype: str}
    return tuple(plain[type(a)](a) if type(a) in plain else a for a in arguments)


def on_device(tensor: torch.Tensor):
    """Context in which a kernel launches on the tensor's device and torch's current stream there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products follow torch.backends.cuda.matmul's TF32 setting."""
    # 16-bit operands have one precision, which Triton calls "ieee"; so do products on AMD's GPUs, not all of which have TF32.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


# Triton's interpreter keeps bfloat16 as its bits and multiplies those; products of bfloat16 are exact in float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in the accumulator's dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
