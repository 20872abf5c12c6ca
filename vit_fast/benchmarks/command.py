"""``vit-fast bench``: what is faster than what on this machine, by how much, and how far it is from what the machine can do."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vit_fast.terminal import CommandError, note, styled

DESCRIPTION = """\
Times every operation and whole models on this machine, each against stock PyTorch and against other packages: what is
faster than what, by how much, and how far it is from what the machine can do, which is measured in the same run.
Every result is held against float64 before its time counts. Exit code 1 if one of ours is over the error budget."""
EXAMPLES = [
    "--minutes 5",
    "--ops attention,mlp --dtype float32,bfloat16 --batch 1,8",
    "--models B,L --contenders plain,freeze,timm --json mine.json --html mine.html",
    "--json mine.json --resume",
    "--compare before.json after.json",
]
_MODELS = ("Ti", "S", "B", "L", "H", "g")
_OPS = ("attention", "linear", "mlp", "layer_norm", "patch_embed")
_PARTS = ("models", "ops", "overhead", "training")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _several(allowed: tuple[str, ...], none: bool = False) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if none and text == "none":
            return []
        chosen = [name.strip() for name in text.split(",")]
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return chosen

    return parse


def _numbers(text: str) -> list[int]:
    values = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if 0 in values:
        raise argparse.ArgumentTypeError(f"whole numbers from 1 on are needed, with commas between, got {text!r}")
    return values


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text!r}")
    return value


def shape_options(sub: argparse.ArgumentParser) -> None:
    """What `vit-fast tune` takes too."""
    sub.add_argument(
        "--ops", type=_several(_OPS, none=True), metavar="NAME,…", help=f"of {', '.join(_OPS)}, or none; default: all"
    )
    sub.add_argument(
        "--models", type=_several(_MODELS, none=True), metavar="NAME,…", help=f"of {', '.join(_MODELS)}; default: B"
    )
    sub.add_argument("--image", type=_numbers, default=[224], metavar="PIXELS,…", help="pixels a side; default: 224")
    sub.add_argument("--batch", type=_numbers, metavar="N,…", help="images; default: 1,8 on a CPU, 1,8,32,128,256 on a GPU")
    sub.add_argument(
        "--dtype", type=_several(tuple(_DTYPES)), metavar="NAME,…",
        help=f"of {', '.join(_DTYPES)}; default: float32 on a CPU, bfloat16 on a GPU",
    )  # fmt: skip
    sub.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: cuda if there is one, else cpu")


def add_options(sub: argparse.ArgumentParser) -> None:
    shape_options(sub)
    sub.add_argument("--parts", type=_several(_PARTS), metavar="NAME,…", help=f"of {', '.join(_PARTS)}; default: all")
    sub.add_argument(
        "--contenders", metavar="NAME,…",
        help="such as freeze, plain, 'timm compiled', 'original*', openvino, or implementations, such as cpp; default: all",
    )  # fmt: skip
    sub.add_argument(
        "--minutes", type=_minutes, metavar="N", help="for all of it; the most telling comes first; default: no limit"
    )
    sub.add_argument(
        "--seconds", type=_minutes, default=0.5, metavar="N", help="of rounds for each line of an operation; default: 0.5"
    )
    sub.add_argument("--json", metavar="FILE", help="every figure; default: vit-fast-bench.json here")
    sub.add_argument("--resume", action="store_true", help="go on with the file that an interrupted run left")
    sub.add_argument("--html", metavar="FILE", help="a page with tables and plots; with --resume of a finished run only that")
    sub.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="two files: what got faster or slower; nothing is run"
    )


def run(arguments) -> int:
    from vit_fast.benchmarks import record as records

    if arguments.compare:
        from vit_fast.benchmarks.compare import told

        print(told(*(records.read(Path(path)) for path in arguments.compare)))
        return 0
    record, device = _record(arguments)
    if arguments.html:
        _writable(Path(arguments.html))
    data = record.data
    interrupted = False
    try:
        _measure(arguments, record, device)
    except KeyboardInterrupt:
        interrupted = True
    show(data)
    if arguments.html:
        from vit_fast.benchmarks.page import html

        Path(arguments.html).write_text(html(data), encoding="utf-8")
        print(f"page: {Path(arguments.html).resolve()}")
    print(f"written: {record.path.resolve()}")
    if interrupted:
        note(f"interrupted; what was measured is kept, and --json {record.path} --resume goes on from there")
        return 130
    return 1 if data["failed"] else 0


def _writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise CommandError(f"there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{path} can't be written")


def _record(arguments):
    from vit_fast.benchmarks.record import Record, environment_of
    from vit_fast.inputs import device_for

    device = device_for(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"bench times CPUs and CUDA devices, not {device}")
    path = Path(arguments.json or "vit-fast-bench.json")
    _writable(path)
    make = Record
    if arguments.resume:
        if not path.exists():
            raise CommandError(f"there is nothing to resume: no file {path}")
        make = Record.resumed
    said = (lambda text: print(text, file=sys.stderr, flush=True)) if not sys.stderr.isatty() else (lambda text: None)
    return make(path, environment_of(device), arguments.minutes, say=said), device


def _measure(arguments, record, device) -> None:
    from vit_fast.benchmarks import cases, suite, timing

    on_cpu = device.type == "cpu"
    dtypes = [_DTYPES[name] for name in arguments.dtype or (["float32"] if on_cpu else ["bfloat16"])]
    shapes = shapes_of(arguments, [1, 8] if on_cpu else [1, 8, 32, 128, 256])
    ceilings = timing.measure_ceilings(device, {name: cases.DTYPES[name] for name in dtypes})
    record.ceilings(ceilings)
    products = ", ".join(f"{name} {1e3 * rate:,.0f} GFLOP/s" for name, rate in ceilings.products_tflop_s.items())
    e = record.data["environment"]
    print(f"{e['device']}, {e['threads']} threads, torch {e['torch']}", flush=True)
    print(f"ceilings: a copy {1e3 * ceilings.copy_tb_s:.1f} GB/s; a product {products}", flush=True)
    contenders = None if arguments.contenders is None else [name.strip() for name in arguments.contenders.split(",")]
    _check_contenders(contenders)
    parts = arguments.parts or _PARTS
    ops = _OPS if arguments.ops is None else arguments.ops
    choice = suite.Choice(device, parts, ops, shapes, dtypes, contenders, arguments.seconds)
    tasks = suite.plan(record, ceilings, choice)
    if not tasks:
        raise CommandError("nothing is left to measure: choose other --parts, --ops or --models")
    with _status() as tell:
        for task, _, left in suite.carry_out(record, tasks, device):
            tell(f"about {duration(left)} left · {task.name}")


def shapes_of(arguments, batches: list[int]) -> list:
    """The shapes that the options ask for; ``batches`` unless they say which."""
    from vit_fast.benchmarks import cases

    shapes = []
    for model in ["B"] if arguments.models is None else arguments.models:
        for image in arguments.image:
            patch = cases.shape_of(model).patch
            if image % patch:
                raise CommandError(f"--image {image}: the image size of {cases.MODELS[model]} is a multiple of {patch} pixels")
            shapes += [cases.shape_of(model, image, batch) for batch in arguments.batch or batches]
    return shapes


def _check_contenders(names: list[str] | None) -> None:
    from vit_fast.backends import NAMES
    from vit_fast.benchmarks import models

    contenders = (*models.ON_CPU, *models.ON_GPU, *models.TRAINING)
    for name in names or ():
        if name not in NAMES and not any(c.is_called(name) for c in contenders):
            known = sorted({c.name for c in contenders} | set(NAMES))
            raise CommandError(f"--contenders: there is no {name!r}; there is {', '.join(known)}, and * stands for anything")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


@contextlib.contextmanager
def _status():
    """Gives a function that shows one line on stderr: in place on a terminal, else one after another."""
    live = sys.stderr.isatty()
    width = 0

    def tell(text: str) -> None:
        nonlocal width
        sys.stderr.write(f"\r{text.ljust(width)[:200]}" if live else f"[{time.strftime('%H:%M:%S')}] {text}\n")
        sys.stderr.flush()
        width = len(text)

    try:
        yield tell
    finally:
        if live:
            sys.stderr.write("\r" + " " * width + "\r")


def show(data: dict) -> None:
    """Everything that was measured, the summary last."""
    from vit_fast.benchmarks import tables

    rows = data["rows"]
    for text in (*tables.operations(rows), *tables.overhead(rows), *tables.models(rows)):
        print("\n" + text)
    for headline, lines in (
        ("Slower than the best of the others", tables.lost(rows)),
        ("Failed", data["failed"]),
        ("Left out", tables.reasons(data["skipped"])),
    ):
        if lines:
            print("\n" + styled(headline, "bold"))
            print("\n".join(f"  {line}" for line in lines))
    summary = tables.speed_ups(rows)
    if summary:
        print("\n" + summary)
