#!/usr/bin/env python3
"""Compile every Triton kernel for every target, with no GPU, and say what came out.

    python bench/compile_report.py [--subset] [--targets sm_90,gfx942] [--ops attention] [--models B,H] [--json FILE]

The operations are called as they are, on `meta` tensors, with a stub in the place of Triton's driver: every launch becomes a
compilation for the stub's target, with the configuration that the launcher chose. Per kernel, shape and target the report gives

    regs      registers a thread            spill   bytes a thread keeps in local memory instead
    shared    bytes of shared memory        res.    programs resident on a multiprocessor, by registers, shared memory, warps
    products  tensor-core instructions in the code: wgmma, mma.sync, tcgen05, mfma; "serialized": ptxas says that it found no
              way to let the wgmma run beside other work
    GFLOP, MB, floor   of the whole call of the operation, and how long the target takes for them at least (roofline.py)

Launches of the same code share a line: the first one's call and shape, "+n" for n more (--every-shape gives each its own).

Exit code 1, with the offending rows last, where a kernel does not compile or takes more shared memory than the target has,
where a hot 16-bit kernel spills on sm_80, sm_90 or sm_100, or where a product on sm_90 runs without wgmma and WITHOUT_WGMMA
below does not say why that is better. Exit code 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the processes that it starts inherit it
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: this program compiles
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does when it is unset, less a warning
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from compiling import Launch, compiling_for, resident_programs, resources_of  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from vit_fast.benchmarks import cases, roofline  # noqa: E402

# A product on sm_90 that is better off without wgmma: (kernel and its constants, dtypes, why). First match counts.
WITHOUT_WGMMA = [
    ("*", ("fp32",), "float32 without TF32 is exact: no tensor core multiplies float32"),
    (
        "_attention_bwd_kernel *GRADIENTS=keys *",
        ("tf32",),
        "some products have a step's queries as rows: the 64 that wgmma takes spill for heads of 64 channels, and the last "
        "step of wider ones has fewer",
    ),
]

HOT_TARGETS = (80, 90, 100)  # where a hot 16-bit kernel must not spill


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One launch: what was called, what was compiled, what it takes. Figures of roofline.py are those of the whole call."""

    op: str
    variant: str
    shape: str
    dtype: str
    direction: str
    target: str
    hot: bool
    kernel: str = ""
    programs: int = 0
    warps: int = 0
    stages: int = 0
    constants: dict = field(default_factory=dict)
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    resident: int = 0
    instructions: dict = field(default_factory=dict)
    without_wgmma: int = 0
    serialized: bool = False
    gflop: float = 0.0
    megabytes: float = 0.0
    floor_us: float = 0.0
    compiled: str = ""  # Triton's hash: equal where the same code serves several shapes
    problems: list = field(default_factory=list)


def target_name(arch: int | str) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


def row_of(launch: Launch, arch: int | str, work: roofline.Work, **labels) -> Row:
    """The row of a launch, judged. ``labels``: op, variant, shape, dtype, direction, hot."""
    from vit_fast.kernels.common import TARGETS

    shared_limit = TARGETS[arch].shared_memory
    r = resources_of(launch.compiled)
    row = Row(
        **labels,
        target=target_name(arch),
        kernel=launch.kernel,
        programs=launch.programs,
        warps=launch.warps,
        stages=launch.stages,
        constants={k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in launch.constants.items()},
        registers=r.registers,
        spilled_bytes=r.spilled_bytes,
        shared_bytes=r.shared_bytes,
        resident=resident_programs(arch, r.registers, r.shared_bytes, launch.warps, r.tensor_columns),
        instructions=r.instructions,
        without_wgmma=r.without_wgmma,
        serialized=r.serialized,
        gflop=work.flops / 1e9,
        megabytes=work.bytes / 1e6,
        floor_us=roofline.CEILINGS[arch].floor_us(work, labels["dtype"]),
        compiled=launch.compiled.hash,
    )
    if r.shared_bytes > shared_limit:
        row.problems.append(f"takes {r.shared_bytes} bytes of shared memory, {row.target} has {shared_limit}")
    elif row.resident == 0:
        row.problems.append(f"does not fit on a multiprocessor of {row.target}")
    if r.spilled_bytes and row.hot and row.dtype in ("bf16", "fp16") and arch in HOT_TARGETS:
        row.problems.append(f"spills {r.spilled_bytes} bytes a thread")
    if r.without_wgmma and reason_without_wgmma(row) is None:
        row.problems.append(f"{r.without_wgmma} of its products run without wgmma, and WITHOUT_WGMMA doesn't say why")
    return row


def reason_without_wgmma(row: Row) -> str | None:
    for pattern, dtypes, reason in WITHOUT_WGMMA:
        if fnmatch.fnmatchcase(f"{row.kernel} {configuration(row)}", pattern) and row.dtype in dtypes:
            return reason
    return None


def configuration(row: Row) -> str:
    """What the kernel was compiled with, as "NAME=value NAME=value"."""
    return " ".join(f"{k}={v}" for k, v in row.constants.items())


# ---- Calling the operations -----------------------------------------------------------------------------------------

_arch: int | str = 80  # of the target that launch choices are made for


@functools.cache
def _operations():
    """The operations' tables, with a target and the right to launch in the place of a GPU."""
    from vit_fast import backends
    from vit_fast.kernels import common

    common.target_of = lambda device: common.TARGETS[_arch]  # before any kernel file takes the name from there
    backends.triton_refuses = lambda *tensors: None  # it would say that there is no GPU
    autocast_enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind=None: False if kind == "meta" else autocast_enabled(kind or "cuda")
    return backends.OPERATIONS


class _LaunchOnMeta(TorchDispatchMode):
    """Where `meta` tensors would get an operation's fake, they get what launches its kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vit_fast":  # registered for any device: this one's key stands for all
            return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def compile_case(case: cases.Case, dtype: str, arch: int | str) -> tuple[list[Row], list[str]]:
    """(rows, notes) of one case, the Triton implementation asked for by name: forward, the forward of training, backward."""
    operation = _operations()[case.op]
    from vit_fast import backends

    with backends.use("triton"):
        return _compile_case(operation, case, dtype, arch)


def _compile_case(operation, case: cases.Case, dtype: str, arch: int | str) -> tuple[list[Row], list[str]]:
    global _arch
    if "triton" not in operation.implementations:
        return [], [f"{case.op}: no Triton implementation"]
    implementation = operation.implementations["triton"]
    _arch = arch
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    arguments = case.arguments(cases.Maker("meta", cases.DTYPES[dtype]))
    refused = implementation.supports(*arguments)
    labels = {"op": case.op, "variant": case.variant, "shape": case.shape.label, "dtype": dtype, "hot": case.hot}
    if refused is not None:
        return [], [f"{case.name} {case.shape.label} {dtype}: the Triton implementation refuses it: {refused}"]
    rows: list[Row] = []
    direction = "forward"
    with compiling_for(arch) as launches:

        def collect(direction: str) -> None:
            work = case.work(direction, cases.DTYPES[dtype].itemsize)
            rows.extend(row_of(launch, arch, work, direction=direction, **labels) for launch in launches)
            launches.clear()

        try:
            with _LaunchOnMeta():
                with torch.no_grad():
                    implementation.run(*arguments)
                collect("forward")
                direction = "training forward"
                outputs = implementation.run(*arguments)
                collect(direction)
                direction = "backward"
                outputs = [o for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if o is not None]
                wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
                torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs], allow_unused=True)
                collect(direction)
        except Exception as error:  # goes into the report, and makes it fail
            failed = Row(**labels, direction=direction, target=target_name(arch))
            failed.problems.append(f"does not compile: {_told_by(error)}")
            rows.append(failed)
    return rows, []


def _told_by(error: BaseException) -> str:
    """An error in one line: the innermost cause, and of it the end. Triton quotes the source before it says what is wrong."""
    kind = type(error).__name__
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r" object at 0x\w+", "", " ".join(str(error).split()))
    return f"{kind}: {text if len(text) < 300 else '... ' + text[-300:]}"


# ---- All of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What one process compiles at a time; no two units share a compilation."""

    arch: int | str
    op: str
    dtype: str
    shapes: tuple[cases.Shape, ...]
    cold: tuple[str, ...]  # the models whose variants off the hot path are compiled too

    def __str__(self) -> str:
        return f"{target_name(self.arch)} {self.op} {self.dtype}"


def compile_unit(unit: Unit) -> tuple[list[Row], list[str], float]:
    start = time.monotonic()
    rows, notes = [], []
    for shape in unit.shapes:
        for case in (c for c in cases.cases_of(unit.op, shape) if c.hot or shape.model in unit.cold):
            more, told = compile_case(case, unit.dtype, unit.arch)
            rows += more
            notes += told
    return rows, notes, time.monotonic() - start


def compile_all(units: list[Unit], jobs: int) -> tuple[list[Row], list[str]]:
    """(rows, notes) of all units, in their order. A compiler that takes its process down fails its own unit only."""
    results: dict[Unit, tuple[list[Row], list[str], float]] = {}

    def finished(unit: Unit, result: tuple[list[Row], list[str], float]) -> None:
        results[unit] = rows, _, seconds = result
        counts = f"{len({row.compiled for row in rows})} kernels, {len(rows)} launches, {seconds:.0f} s"
        print(f"[{len(results)}/{len(units)}] {unit}: {counts}", file=sys.stderr, flush=True)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(units)), context) as pool:
        # The longest first: no process waits for the last one.
        futures = {pool.submit(compile_unit, unit): unit for unit in sorted(units, key=lambda u: cases.OPS.index(u.op))}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                finished(futures[future], future.result())
    for unit in (u for u in units if u not in results):  # one process that died broke the pool for all: each in its own
        with ProcessPoolExecutor(1, context) as pool:
            future = pool.submit(compile_unit, unit)
            died = isinstance(future.exception(), BrokenProcessPool)
            finished(unit, ([_crashed(unit)], [], 0.0) if died else future.result())
    ordered = [results[unit] for unit in units]
    notes = dict.fromkeys(note for _, told, _ in ordered for note in told)
    return [row for rows, _, _ in ordered for row in rows], list(notes)


def _crashed(unit: Unit) -> Row:
    row = Row(unit.op, "", "", unit.dtype, "", target_name(unit.arch), True)
    row.problems.append("the compiler's process died")
    return row


# ---- Printing -------------------------------------------------------------------------------------------------------

_HEADER = "target dtype kernel call shape warps regs spill shared res. products GFLOP MB floor/µs".split()


def _cells(row: Row, more: int = 0) -> tuple[str, ...]:
    direction = "training" if row.direction == "training forward" else row.direction
    call = " ".join(filter(None, (row.op, row.variant, direction)))
    products = " ".join(f"{name}:{count}" for name, count in row.instructions.items()) or "-"
    products += " serialized" if row.serialized else ""
    return (
        row.target, row.dtype, row.kernel, call, row.shape + (f" +{more}" if more else ""), str(row.warps), str(row.registers),
        str(row.spilled_bytes), str(row.shared_bytes), str(row.resident), products,
        f"{row.gflop:.4g}", f"{row.megabytes:.4g}", f"{row.floor_us:.4g}",
    )  # fmt: skip


def print_table(rows: Iterable[tuple[Row, int]]) -> None:
    table = [_HEADER, *(_cells(row, more) for row, more in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_HEADER))]
    for line in table:
        cells = (c.ljust(w) if i < 5 or i == 10 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        print("  ".join(cells).rstrip())


def one_per_kernel(rows: list[Row]) -> list[tuple[Row, int]]:
    """Of the launches that run the same code, or fail in the same way, the first, and how many more there are."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.target, row.dtype, row.compiled or (row.op, *row.problems)].append(row)
    return [(group[0], len(group) - 1) for group in groups.values()]


def finish(rows: list[Row], notes: list[str] = (), every_shape: bool = False, json_file: str | None = None) -> int:
    """Print everything, the offending rows last; the exit code."""
    print_table([(row, 0) for row in rows] if every_shape else one_per_kernel(rows))
    for note in notes:
        print(f"note: {note}")
    if json_file:
        versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
        report = {"versions": versions, "rows": [asdict(row) for row in rows], "notes": list(notes)}
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n")
    bad = one_per_kernel([row for row in rows if row.problems])
    if bad:
        print("\nnot acceptable:")
        for row, more in bad:
            where = " ".join(filter(None, (row.op, row.variant, row.direction)))
            also = f" (and {more} more shapes)" if more else ""
            config = configuration(row)
            kernel = f"{row.kernel} at " if row.kernel else ""
            print(f"  {row.target} {row.dtype} {kernel}{where} {row.shape}{also}: {'; '.join(row.problems)}")
            if config:
                print(f"      {config} warps={row.warps} stages={row.stages}")
    kernels = len({(row.target, row.compiled) for row in rows if row.compiled})
    targets = ", ".join(dict.fromkeys(row.target for row in rows)) or "no target"
    compiled = f"{kernels} kernels compiled for {targets} with Triton {triton.__version__}"
    print(f"{compiled}: {len(rows)} launches, {len(bad)} not acceptable")
    return 1 if bad else 0


# ---- Command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _choices(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    allowed = list(allowed)

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        for part in chosen:
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(allowed)}")
        return chosen or allowed

    return parse


ARCHS = {target_name(arch): arch for arch in roofline.CEILINGS}


def parser() -> argparse.ArgumentParser:
    p = _Parser(prog="compile_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subset = "what CI runs: B/16 and H/14 at 224 px in bf16 for sm_80, sm_90, sm_100 and gfx942; B/16 in fp32 for sm_90"
    p.add_argument("--subset", action="store_true", help=subset)
    p.add_argument("--targets", type=_choices(ARCHS), help=f"comma-separated, of {', '.join(ARCHS)}")
    p.add_argument("--ops", type=_choices(cases.OPS), help=f"comma-separated, of {', '.join(cases.OPS)}")
    p.add_argument("--models", type=_choices(cases.MODELS), help=f"comma-separated, of {', '.join(cases.MODELS)}")
    p.add_argument("--images", type=_choices(map(str, cases.IMAGES)), help="comma-separated pixels a side, of 224, 384, 512")
    p.add_argument("--dtypes", type=_choices(cases.DTYPES), help="comma-separated, of bf16, fp16, fp32 (exact products), tf32")
    p.add_argument("--only-hot", action="store_true", help="leave out what plain inference and training never run")
    p.add_argument("--every-shape", action="store_true", help="a line for every shape, not one for every compiled kernel")
    p.add_argument("--json", metavar="FILE", help="write every row there too")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: as many as cores)")
    return p


def units_of(args) -> list[Unit]:
    targets = args.targets or (["sm_80", "sm_90", "sm_100", "gfx942"] if args.subset else list(ARCHS))
    dtypes = args.dtypes or (["bf16", "fp32"] if args.subset else ["bf16", "fp16", "fp32"])
    models = args.models or (["B", "H"] if args.subset else list(cases.MODELS))
    images = [int(i) for i in args.images] if args.images else ([224] if args.subset else list(cases.IMAGES))
    units = []
    for target, op, dtype in itertools.product(targets, args.ops or cases.OPS, dtypes):
        narrow = args.subset and dtype == "fp32"  # CI looks at float32 on one model and one target
        if narrow and target not in (args.targets or ["sm_90"]):
            continue
        # Large batches and single images may get other configurations.
        labels = itertools.product(models[:1] if narrow else models, images, (128, 1))
        labels = (label for label in labels if not args.subset or label[2] > 1 or label[0] == models[0])
        shapes = tuple(cases.shape_of(*label) for label in labels)
        cold = tuple(models)
        if args.only_hot or args.subset:  # CI looks at the other variants on that model and target too
            cold = tuple(models[:1]) if args.subset and not args.only_hot and not narrow and target == "sm_90" else ()
        units.append(Unit(ARCHS[target], op, dtype, shapes, cold))
    return units


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.jobs < 1:
        p.error(f"argument --jobs: must be at least 1, got {args.jobs}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        p.error(f"argument --json: no such folder: {Path(args.json).absolute().parent}")
    rows, notes = compile_all(units_of(args), args.jobs)
    return finish(rows, notes, args.every_shape, args.json)


if __name__ == "__main__":
    sys.exit(main())
