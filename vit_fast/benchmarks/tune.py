"""``vit-fast tune``: times the implementations of each operation here, and keeps which one is fastest for `auto`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from vit_fast.benchmarks.command import _DTYPES, _OPS, _minutes, _status, duration, shape_options, shapes_of
from vit_fast.terminal import CommandError, note, styled, table

DESCRIPTION = """\
Times the implementations of each operation at a model's shapes on this machine, leaves out any that breaks the error budget,
and keeps the fastest for `auto`, which from then on takes it in every process: no operation is then slower than stock
PyTorch at these shapes. Kept for this device, driver, torch, triton and vit_fast; vit-fast info shows what is in force."""
EXAMPLES = ["", "--models S,L --batch 1,16 --dtype float32", "--ops attention --launches"]


def add_options(sub: argparse.ArgumentParser) -> None:
    shape_options(sub)
    sub.add_argument(
        "--seconds", type=_minutes, default=0.4, metavar="N", help="of rounds for each timing, on a CPU; default: 0.4"
    )
    sub.add_argument(
        "--launches", action="store_true", help="on a GPU: other launch configurations of the Triton kernels as well"
    )


def run(arguments) -> int:
    from vit_fast import tuning
    from vit_fast.benchmarks import cases, operations, suite, timing
    from vit_fast.benchmarks.record import Record, environment_of
    from vit_fast.inputs import device_for

    device = device_for(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"tune times CPUs and CUDA devices, not {device}")
    if arguments.launches and device.type != "cuda":
        raise CommandError("--launches is for the Triton kernels on a GPU")
    if tuning.folder() is None:
        raise CommandError("the variable VIT_FAST_TUNING is off: unset it, or name a folder with it")
    on_cpu = device.type == "cpu"
    dtypes = [_DTYPES[name] for name in arguments.dtype or ["float32", "bfloat16"] + ["float16"] * (not on_cpu)]
    shapes = shapes_of(arguments, [1, 8] if on_cpu else [1, 8, 32, 128])
    ops = _OPS if arguments.ops is None else arguments.ops
    todo = [(case, dtype) for dtype in dtypes for shape in shapes for op in ops for case in suite.hot_cases(op, shape, device)]
    if not todo:
        raise CommandError("nothing is left to time: choose other --ops or --models")
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    failed, found, path = [], [], None
    with tempfile.TemporaryDirectory() as folder, _status() as tell:
        environment = environment_of(device)
        begun = time.monotonic()
        for i, (case, dtype) in enumerate(todo):
            left = (time.monotonic() - begun) / i * (len(todo) - i) if i else len(todo) * (2.5 * arguments.seconds + 1)
            tell(f"about {duration(left)} left · {case.name} {case.shape.label} {dtype}")
            record = Record(Path(folder, "rows.json"), environment, say=lambda text: None)
            ceilings = timing.Ceilings(1.0, dict.fromkeys(cases.DTYPES, 1.0))  # no floor is asked for
            launches = []
            if arguments.launches:
                from vit_fast.benchmarks.launches import launches_of, tune_case

                launches = launches_of(tune_case(case, dtype, device, say=lambda text: print(text, file=sys.stderr)))
                if launches:
                    tuning.write(device, [], launches, date)
                    tuning.load(device)
            operations.measure(record, ceilings, case, dtype, device, seconds=arguments.seconds)
            failed += record.data["failed"]
            choices = tuning.choices_from(record.rows)
            found += [(case, choice) for choice in choices]
            try:
                path = tuning.write(device, choices, launches, date)
            except OSError as error:
                raise CommandError(f"{tuning.folder()} can't be written: {error}; VIT_FAST_TUNING names another") from None
    tuning.load(device)
    print(styled("What was fastest", "bold"))
    print(table(("", "", "for", "taken", "median ms"), [_line(case, choice) for case, choice in found], left=4))
    print(f"written: {path}; `auto` takes these from now on")
    if any(len(choice.ms) > 1 for _, choice in found) is False:
        note("only stock PyTorch could run these: vit-fast info says why")
    for line in failed:
        note(f"left out, over the error budget: {line}")
    return 1 if failed else 0


def _line(case, choice) -> tuple[str, ...]:
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(choice.ms.items(), key=lambda item: item[1]))
    return case.name, f"{case.shape.label} {choice.dtype}", "training" if choice.recording else "inference", choice.taken, times
