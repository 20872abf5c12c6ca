"""Triton kernels compiled instead of launched, for any target and with no GPU, and what the compiled code takes.

A stub stands in the place of Triton's driver, and every `kernel[grid](...)` becomes a compilation for the stub's target.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget

# ---- What a multiprocessor holds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """Of an SM, or of an AMD compute unit (four SIMDs; registers are a SIMD lane's, warps are wavefronts)."""

    warps: int
    programs: int
    shared_memory: int
    registers: int


# CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 and 4 ISA guides.
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024, 65536),
    86: Multiprocessor(48, 16, 100 * 1024, 65536),
    89: Multiprocessor(48, 24, 100 * 1024, 65536),
    90: Multiprocessor(64, 32, 228 * 1024, 65536),
    100: Multiprocessor(64, 32, 228 * 1024, 65536),
    120: Multiprocessor(48, 24, 100 * 1024, 65536),
    "gfx942": Multiprocessor(32, 32, 64 * 1024, 512),
    "gfx950": Multiprocessor(32, 32, 160 * 1024, 512),
}


def resident_programs(arch: int | str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """Programs that fit on one multiprocessor at a time.

    CUDA gives registers out in units of 256 a warp, and keeps 1 KB of shared memory for each program.
    """
    mp = MULTIPROCESSORS[arch]
    if isinstance(arch, str):
        waves_per_simd = min(8, mp.registers // max(8, -(-registers // 8) * 8))
        limits = [4 * waves_per_simd // warps, mp.programs]
    else:
        a_warp = -(-max(registers, 1) * 32 // 256) * 256
        limits = [mp.registers // (a_warp * warps), mp.warps // warps, mp.programs]
        shared += 1024
    if shared:
        limits.append(mp.shared_memory // shared)
    if tensor_columns:
        limits.append(512 // tensor_columns)
    return min(limits)


# ---- Compiling instead of launching ---------------------------------------------------------------------------------


class StubDriver:
    """As much of a Triton driver as a compilation asks for. The target stands for the device: Triton caches by device."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target

    def get_current_stream(self, device):
        return 0


@dataclass
class Launch:
    """A launch that became a compilation."""

    kernel: str
    programs: int
    warps: int
    stages: int
    constants: dict
    compiled: object  # triton's CompiledKernel


def gpu_target(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


@contextmanager
def compiling_for(arch: int | str):
    """Inside, `kernel[grid](...)` compiles for the architecture and appends a `Launch` to the list that is yielded."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes = grid(named) if callable(grid) else grid
        programs = functools.reduce(lambda a, b: a * int(b), sizes, 1)
        constants = {p.name: named[p.name] for p in self.params if p.is_constexpr and p.name in named}
        metadata = compiled.metadata
        launches.append(Launch(self.__name__, programs, metadata.num_warps, metadata.num_stages, constants, compiled))
        return compiled

    driver.set_active(StubDriver(gpu_target(arch)))
    JITFunction.run = compile_instead
    try:
        yield launches
    finally:
        JITFunction.run = run


# ---- Reading what was compiled --------------------------------------------------------------------------------------


@dataclass
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int  # of Blackwell's tensor memory
    instructions: dict  # {"wgmma": 12, ...}
    without_wgmma: int  # products that did not become wgmma, on sm_90
    serialized: bool  # ptxas makes each wgmma wait for the one before


_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_s?mfma",
}
_resources: dict[str, Resources] = {}


def resources_of(compiled) -> Resources:
    """Registers, spills and instructions, from the binary: CompiledKernel knows them only once it is loaded on a device."""
    if compiled.hash not in _resources:
        _resources[compiled.hash] = _read(compiled)
    return _resources[compiled.hash]


def _read(compiled) -> Resources:
    asm, metadata = compiled.asm, compiled.metadata
    if metadata.target.backend == "hip":
        code = asm["amdgcn"]
        fields = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", code, re.M))
        registers = int(fields["vgpr_count"])
        spilled = max(int(fields["private_segment_fixed_size"]), 4 * int(fields["vgpr_spill_count"]))
        shared = metadata.shared + int(fields["group_segment_fixed_size"])
    else:
        code = asm["ptx"]
        registers, spilled = _cubin_usage(asm["cubin"], metadata.name)
        shared = metadata.shared
    found = {name: len(re.findall(pattern, code)) for name, pattern in _INSTRUCTIONS.items()}
    # In the last IR before LLVM a product that was given to wgmma has become a warp_group_dot; what is still tt.dot was not.
    left = len(re.findall(r"\btt\.dot\b", asm["ttgir"])) if metadata.target.arch == 90 else 0
    return Resources(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        instructions={name: count for name, count in found.items() if count},
        without_wgmma=left,
        serialized=found["wgmma"] > 0 and _serialized(code),
    )


def _cubin_usage(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers, bytes of stack frame and local memory) a thread. Triton kernels have no arrays of their own: it is spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = text.partition(f"Function {name}:")[2]
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _serialized(ptx: str) -> bool:
    """Whether ptxas remarks that it runs this sm_90 code's wgmma instructions one after the other (C7510 and following)."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in told
