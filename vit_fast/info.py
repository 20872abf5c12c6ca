"""``vit-fast info``: what is installed, what runs here, what each operation would take, and why not the rest."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib import metadata

import torch

import vit_fast
from vit_fast import backends, extension, tuning
from vit_fast.inputs import devices
from vit_fast.ops.checks import dtype_name
from vit_fast.terminal import styled, table

_OPTIONAL = ("pillow", "rich", "matplotlib", "scikit-image", "safetensors")


def typical_arguments(device: str, dtype: torch.dtype) -> dict[str, tuple]:
    """For each operation the arguments, as its implementations take them, that one image gives in ViT-B/16 at inference."""

    def empty(*shape):
        return torch.empty(shape, device=device, dtype=dtype)

    tokens, width, hidden, heads = 197, 768, 3072, 12
    x, vector = empty(1, tokens, width), empty(width)
    embedding = (empty(width, 3, 16, 16), vector, empty(1, 1, width), empty(1, tokens, width))
    fc1, fc2 = (empty(hidden, width), empty(hidden)), (empty(width, hidden), vector)
    return {
        "patch_embed": (empty(1, 3, 224, 224), *embedding, None, None),
        "layer_norm": (x, vector, vector, 1e-6, None),
        "linear": (x, empty(width, width), vector, None, x, 0.0, 0.0),
        "mlp": (x, *fc1, *fc2, "gelu", x, 0.0, 0.0),
        "attention": (empty(1, tokens, 3, heads, width // heads), 0.0, "none"),
    }


def choices(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What each operation would take for those arguments: a name, or "none" where the one in force can't run."""
    taken = {}
    for op, arguments in typical_arguments(device, dtype).items():
        try:
            taken[op] = backends.OPERATIONS[op].choose(*arguments)
        except RuntimeError:  # the reason is among `refusals`
            taken[op] = "none"
    return taken


def measured(device: str, dtype: torch.dtype) -> set[str]:
    """The operations whose choice for those arguments was measured, on this machine or on one like it."""
    if backends.selected() != "auto":
        return set()
    arguments = typical_arguments(device, dtype)
    return {op for op in arguments if tuning.choice(op, arguments[op]) == backends.OPERATIONS[op].choose(*arguments[op])}


def refusals(device: str, dtype: torch.dtype) -> list[str]:
    """Why the implementations that could be faster can't take those arguments, operations with one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, arguments in typical_arguments(device, dtype).items():
        for name in ("triton", "cpp"):
            reason = backends.OPERATIONS[op].reason_against(name, *arguments)
            if reason is not None:
                reasons.setdefault((name, reason), []).append(op)
    return [f"{name} for {', '.join(ops)}: {reason}" for (name, reason), ops in reasons.items()]


def processor() -> str:
    """The CPU's name for people, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return (names and names[0]) or platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _section(title: str, lines: list[tuple[str, str]]) -> None:
    print("\n" + styled(title, "bold"))
    print("\n".join(f"  {name:<13} {text}" for name, text in lines))


def _device_lines() -> list[tuple[str, str]]:
    lines = [
        ("cpu", processor()),
        ("", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores"),
    ]
    for device in devices():
        if device.startswith("cuda"):
            p = torch.cuda.get_device_properties(device)
            what = f"sm_{p.major}{p.minor}" if torch.version.hip is None else p.gcnArchName
            lines.append((device, f"{p.name}, {what}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB"))
        elif device == "mps":
            lines.append((device, "Apple GPU"))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        lines.append(("cuda", "no device" if built else "no: this torch is built without CUDA"))
    return lines


def _choice_lines() -> list[tuple[str, str]]:
    """Where `auto` has its choices from, for each device."""
    lines = []
    for device in devices():
        table = tuning.load(device)
        timed = len(table.choices) + len(table.launches)
        what = f"{table.source}: {timed} timed" if timed else "the operations' order: nobody measured (vit-fast tune does)"
        lines.append((device, what))
    folder = tuning.folder()
    lines.append(("kept in", str(folder) if folder else "nowhere: VIT_FAST_TUNING is off"))
    return lines + [("not used", notice) for notice in tuning.notices]


def _extension_lines() -> list[tuple[str, str]]:
    lines = []
    for device in extension.PATHS:
        reason = extension.missing(device)
        instructions = f", {extension.instruction_set()} kernels" if device == "cpu" and reason is None else ""
        lines.append((device, f"no: {reason}" if reason else f"loaded{instructions}"))
    return lines


def show() -> int:
    """Print it all."""
    print(styled(f"vit_fast {vit_fast.__version__}", "bold") + f"  in {os.path.dirname(vit_fast.__file__)}")
    python = f"{platform.python_version()}  ({platform.system()} {platform.machine()}, {sys.executable})"
    versions = [("python", python), ("torch", torch.__version__)]
    versions += [(name, _version(name)) for name in ("triton", "numpy", *_OPTIONAL)]
    _section("Versions", versions)
    _section("Devices", _device_lines())
    runs = [(name, "runs" if reason is None else f"no: {reason}") for name, reason in backends.backends().items()]
    _section("Implementations", [*runs, ("in force", f"{backends.selected()}  (vit_fast.use, or the variable VIT_FAST_IMPL)")])

    _section("Extension", _extension_lines())

    cases = [(d, t) for d in devices() for t in (torch.float32, torch.bfloat16)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a table stands among the lines
        _section("Where choices come from", _choice_lines())
    taken = [choices(*case) for case in cases]
    timed = [measured(*case) for case in cases]
    print("\n" + styled("What each operation takes", "bold") + " for an image through ViT-B/16")
    headers = ("", *(f"{device} {dtype_name(dtype)}" for device, dtype in cases))
    cells = [(op, *(t[op] + (", measured" if op in m else "") for t, m in zip(taken, timed, strict=True))) for op in taken[0]]
    print(table(headers, cells))
    print("\n" + styled("Why not the others", "bold"))
    told: dict[str, list[str]] = {}
    for case, header in zip(cases, headers[1:], strict=True):
        for line in refusals(*case):
            told.setdefault(line, []).append(header)
    for line, where in told.items():
        print(f"  {line}" + ("" if len(where) == len(cases) else f"  ({', '.join(where)})"))
    if not told:
        print("  every implementation runs everywhere")
    return 0
