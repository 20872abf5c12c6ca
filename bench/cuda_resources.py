#!/usr/bin/env python3
"""What every kernel of the CUDA object takes on every architecture it was compiled for, with no GPU.

    python bench/cuda_resources.py [OBJECT] [--every] [--json FILE]

Read from the object by cuobjdump (Triton brings one). Per kernel and architecture:

    regs     registers a thread
    spill    bytes a thread keeps in local memory instead: the kernels have no arrays there by themselves
    shared   bytes of static shared memory

A line holds a kernel's instances of all element types and chunk sizes, with the largest of each figure; --every gives each
instance its own. Exit code 1, with the offending ones last, where an instance spills, or where an architecture or one of its
kernels is missing; 2 where there is no object or no cuobjdump.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "csrc")]

import build_extension  # noqa: E402

OBJECT = ROOT / "vit_fast" / "libvit_fast_cuda.so"
ARCHITECTURES = tuple(f"sm_{name.replace('.', '')}" for name in build_extension.CUDA_ARCHITECTURES.split(";"))


@dataclass(frozen=True)
class Usage:
    """One instance of a kernel on one architecture."""

    arch: str
    kernel: str  # with its template arguments
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # static bytes a block

    @property
    def family(self) -> str:
        return self.kernel.partition("<")[0]


def find_cuobjdump() -> str | None:
    """The program: the toolkit's, or the one in Triton's package."""
    try:
        import triton

        return shutil.which("cuobjdump") or shutil.which(triton.knobs.nvidia.cuobjdump.path)
    except (ImportError, RuntimeError):
        return shutil.which("cuobjdump")


def read(path: Path, cuobjdump: str) -> list[Usage]:
    """Every kernel of an object or executable. CalledProcessError where cuobjdump can't read it."""
    command = [cuobjdump, "--dump-resource-usage", str(path)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> list[Usage]:
    """What cuobjdump printed."""
    usages, arch, names = [], "", {}
    mangled = sorted(set(re.findall(r"^ Function (\S+):$", text, re.M)))
    if mangled and shutil.which("c++filt"):
        told = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
        names = dict(zip(mangled, map(_short, told.splitlines()), strict=True))
    name = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").rstrip(":")
        elif name and "REG:" in line:
            figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            spilled = figures["STACK"] + figures["LOCAL"]
            usages.append(Usage(arch, names.get(name, name), figures["REG"], spilled, figures["SHARED"]))
            name = ""
    return usages


def _short(demangled: str) -> str:
    """``add_epilogue_kernel<8, gelu, half>`` of a signature."""
    text = demangled.replace("vit_fast::(anonymous namespace)::", "").replace("vit_fast::", "").removeprefix("void ")
    text = text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("unsigned char", "u8")
    text = re.sub(r"\(Activation\)(\d)", lambda m: ("none", "gelu", "gelu_tanh")[int(m[1])], text)
    depth = 0
    for i, character in enumerate(text):  # up to the arguments' parenthesis, outside the template's
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return text[:i]
    return text


def faults(usages: list[Usage], architectures: Iterable[str] = ARCHITECTURES) -> list[str]:
    """What is not acceptable, a line each."""
    told = [f"{u.arch} {u.kernel}: spills {u.spilled} bytes a thread" for u in usages if u.spilled]
    if not usages:
        return ["no kernel in it"]
    kernels = {u.kernel for u in usages}
    for arch in architectures:
        there = {u.kernel for u in usages if u.arch == arch}
        if not there:
            told.append(f"{arch}: not in the object")
        elif missing := sorted(kernels - there):
            told.append(f"{arch}: without {', '.join(missing)}")
    return told


def table(usages: list[Usage], every: bool) -> str:
    groups: dict[tuple[str, str], list[Usage]] = defaultdict(list)
    for usage in usages:
        groups[usage.kernel if every else usage.family, usage.arch].append(usage)
    width = max(len(kernel) for kernel, _ in groups)
    lines = [f"{'kernel':{width}}  {'arch':8} {'instances':>9} {'regs':>5} {'spill':>6} {'shared':>7}"]
    for (kernel, arch), of_group in sorted(groups.items()):
        most = (max(getattr(u, key) for u in of_group) for key in ("registers", "spilled", "shared"))
        lines.append(f"{kernel:{width}}  {arch:8} {len(of_group):9} " + "{:5} {:6} {:7}".format(*most))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="cuda_resources.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("object", nargs="?", type=Path, default=OBJECT, help="default: vit_fast/libvit_fast_cuda.so")
    p.add_argument("--every", action="store_true", help="a line for each instance")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every instance there")
    args = p.parse_args(argv)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or not args.object.exists():
        what = "no cuobjdump: install triton or the CUDA toolkit" if cuobjdump is None else f"no {args.object}: build it first"
        print(f"cuda_resources.py: {what} (VIT_FAST_EXT=cuda python setup.py build_ext --inplace)", file=sys.stderr)
        return 2
    try:
        usages = read(args.object, cuobjdump)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or error.stdout).strip().splitlines()
        print(f"cuda_resources.py: cuobjdump can't read {args.object}: {told[-1] if told else error}", file=sys.stderr)
        return 2
    if usages:
        print(table(usages, args.every))
    if args.json:
        args.json.write_text(json.dumps([asdict(u) for u in usages], indent=1) + "\n")
    wrong = faults(usages)
    print(f"\n{len(usages)} instances, {args.object.stat().st_size / 1e6:.1f} MB; not acceptable: {len(wrong)}")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
