#!/usr/bin/env python3
"""Everything a GPU can tell about vit_fast, in one run of less than nine minutes: tests, then times, in one JSON file.

    python bench/gpu.py [--out bench/results] [--minutes 8.5] [--parts tests,ops,models,training] [--smoke]

1. The tests of the operations, the model and freeze(), at real shapes.
2. Every operation, forward and backward, in each implementation; attention also with SDPA pinned to cuDNN and to flash. Every
   result that is timed is first held against the float64 reference within the project's error budget.
3. Whole models, B, S, L and H at several batches: freeze() against timm eager, compiled, max-autotuned, in a CUDA graph, and
   with cuDNN's and flash's SDPA; the plain modules, and other packages where they are installed.
4. The training step of the plain modules against timm's.

The file is OUT/<device>/<date>-<commit>.json and is written after every measurement: a run that is cut short keeps what it has.
The most telling comes first, and --minutes 60 has time for all of it. Times are medians of device-event timings over rotated
buffers of random data; ceilings are measured in the same run. The last lines say what failed and what lost to the best of the
others. Exit code 1 if a test or a check failed, 2 without a CUDA device. --smoke runs everything but the tests at tiny shapes
on the CPU, to try the program itself: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does when it is unset, less a warning
    if "--smoke" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch  # noqa: E402
from gpu_tests import TESTS, run_tests  # noqa: E402

from vit_fast.benchmarks import cases, models, operations, suite, tables, timing  # noqa: E402
from vit_fast.benchmarks.models import FROZEN, FROZEN_ALL, Contender  # noqa: E402
from vit_fast.benchmarks.record import Record, environment_of, slug_of  # noqa: E402
from vit_fast.benchmarks.suite import Task  # noqa: E402

PARTS = ("tests", "ops", "models", "training")
TINY = cases.Shape(model="tiny", image=32, batch=2, patch=16, width=32, hidden=64, heads=2, layers=1)
BATCHES = (1, 8, 32, 128, 256)


class OutOfTime(BaseException):
    """The budget is spent; what was measured is saved. Not an Exception: compilers wrap those in their own."""


# ---- The plan -------------------------------------------------------------------------------------------------------


class Plan:
    """Tasks in the order in which they were asked for, none twice."""

    def __init__(self, record: Record, ceilings: timing.Ceilings, parts: Sequence[str], device: torch.device):
        self.record, self.ceilings, self.parts, self.device = record, ceilings, parts, device
        self.tasks: dict[str, Task] = {}

    def _add(self, part: str, name: str, seconds: float, run) -> None:
        if part in self.parts:
            self.tasks.setdefault(name, Task(name, seconds, run))

    def operations(self, shape: cases.Shape, dtype: str, ops: Sequence[str] = cases.OPS) -> None:
        for op in ops:
            for case in suite.hot_cases(op, shape, torch.device("cuda")):
                run = functools.partial(operations.measure, self.record, self.ceilings, case, dtype, self.device)
                self._add("ops", f"{case.name} {shape.label} {dtype}", 8.0, run)

    def models(self, shape: cases.Shape, *names: str, dtype: str = "bf16") -> None:
        for name in names:
            run = functools.partial(models.measure, self.record, shape, dtype, self.device, [Contender.named(name)])
            self._add("models", f"model {shape.label} {dtype} {name}", 8.0 + Contender.named(name).seconds, run)

    def training(self, shape: cases.Shape, *names: str, dtype: str = "bf16") -> None:
        for name in names:
            run = functools.partial(models.measure_training, self.record, shape, dtype, self.device, [Contender.named(name)])
            self._add("training", f"training {shape.label} {dtype} {name}", 10.0 + Contender.named(name).seconds, run)


def plan(record: Record, ceilings: timing.Ceilings, parts: Sequence[str], device: torch.device, smoke: bool) -> list[Task]:
    """What to measure, the most telling first."""
    p = Plan(record, ceilings, parts, device)
    if smoke:
        small = replace(cases.shape_of("Ti", 32, 2), layers=1)
        p.operations(TINY, "fp32")
        p.operations(TINY, "bf16", ("layer_norm",))
        p.models(small, FROZEN, FROZEN_ALL, "plain", "plain torch", "timm", "reference", dtype="fp32")
        p.training(small, "plain", "plain torch", dtype="fp32")
        return list(p.tasks.values())
    big, single = cases.shape_of("B"), cases.shape_of("B", batch=1)
    eager = ("timm", "plain", "timm +cudnn", "timm +flash", "timm graphed")
    p.models(big, FROZEN, "timm", "timm compiled", "plain", "plain torch")
    p.operations(big, "bf16")
    p.models(single, FROZEN, *eager, "timm compiled")
    p.training(big, "plain", "plain torch", "timm", "timm compiled")
    p.operations(single, "bf16")
    p.models(big, "timm compiled +cudnn", "timm compiled +flash", "timm +cudnn", "timm +flash", "reference", FROZEN_ALL)
    for name in ("L", "H", "S"):
        p.models(cases.shape_of(name), FROZEN, "timm", "plain", "timm compiled")
    for batch in BATCHES:
        p.models(replace(big, batch=batch), FROZEN, *eager)
    p.models(big, "timm max-autotune")
    for name in ("S", "L", "H"):
        for batch in BATCHES:
            p.models(cases.shape_of(name, batch=batch), FROZEN, *eager)
    p.operations(replace(big, batch=8), "bf16")
    p.operations(cases.shape_of("B", 384, 64), "bf16", ("attention", "mlp", "layer_norm"))
    for name in ("H", "L", "S"):
        p.operations(cases.shape_of(name), "bf16", ("attention", "mlp", "layer_norm"))
    p.operations(big, "fp16")
    for name in ("B", "S", "L", "H"):
        for batch in BATCHES:
            shape = cases.shape_of(name, batch=batch)
            p.models(shape, *(contender.name for contender in models.ON_GPU))
    for name in ("H", "L", "S"):
        p.operations(cases.shape_of(name), "bf16", ("linear", "patch_embed"))
        p.training(cases.shape_of(name, batch=64), "plain", "plain torch", "timm", "timm compiled")
    return list(p.tasks.values())


# ---- Command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _parts(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(PARTS)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    p = _Parser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of results (default: bench/results)")
    p.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    p.add_argument("--parts", type=_parts, default=list(PARTS), help=f"comma-separated, of {', '.join(PARTS)} (default: all)")
    p.add_argument("--tests", nargs="+", metavar="FILE", help="test files instead of the operations' and the model's")
    p.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, to try this program")
    args = p.parse_args(argv)
    if not args.minutes > 0:
        p.error(f"argument --minutes: must be positive, got {args.minutes}")
    if not args.smoke and not torch.cuda.is_available():
        print("gpu.py: no CUDA device (--smoke tries the program on the CPU)", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.smoke else "cuda")
    environment = environment_of(device, args.smoke)
    commit = (environment["commit"] or "unknown") + ("-dirty" if environment["dirty"] else "")
    folder = args.out / slug_of(environment)
    folder.mkdir(parents=True, exist_ok=True)
    date = environment["date"].replace(":", "").replace("-", "")
    record = Record(folder / f"{date}-{commit}.json", environment, args.minutes)
    record.data["tests"] = []

    def stop(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        files = args.tests or ([] if args.smoke else TESTS)
        if "tests" in args.parts and files:
            run_tests(record, files, seconds=min(0.4 * record.seconds_left(), 210.0))
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        ceilings = timing.measure_ceilings(device, dtypes, tiny=args.smoke)
        record.ceilings(ceilings)
        record.say(f"ceilings: {ceilings.copy_tb_s:.3g} TB/s, {ceilings.products_tflop_s} TFLOP/s")
        for task, _, _ in suite.carry_out(record, plan(record, ceilings, args.parts, device, args.smoke), device):
            record.say(task.name)
    except OutOfTime:
        record.skip("the rest: out of time")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return conclude(record, args.smoke)


def conclude(record: Record, smoke: bool) -> int:
    data = record.data
    data["lost"] = [] if smoke else tables.lost(data["rows"])
    record.save()
    if not smoke:
        for text in tables.models(data["rows"]):
            print("\n" + text)
    print(f"\n{len(data['rows'])} rows, {len(data['skipped'])} skipped -> {record.path}")
    print(
        f"lost to the best of the others: {len(data['lost'])}" if not smoke else "smoke: no figure of this run means anything"
    )
    for line in data["lost"]:
        print(f"  {line}")
    print(f"failed: {len(data['failed'])}")
    for line in data["failed"]:
        print(f"  {line}")
    return 1 if data["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
