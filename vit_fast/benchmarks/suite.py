"""What a run measures, in which order, and how long that takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vit_fast.benchmarks import cases, models, operations, overhead, timing
from vit_fast.benchmarks.record import Record

PARTS = ("models", "ops", "overhead", "training")
# Those of an operation's cases that plain inference and training run, and on CPUs attention that returns probabilities.
MORE_ON_CPU = {"attention": ("probs=all",), "linear": ("fc1", "fc1+gelu_tanh")}


@dataclass(frozen=True)
class Task:
    """A part of a run that is measured whole or not at all."""

    name: str
    seconds: float  # an estimate
    run: Callable[[], None]


@dataclass(frozen=True)
class Choice:
    """What somebody wants measured."""

    device: torch.device
    parts: Sequence[str]
    ops: Sequence[str]
    shapes: Sequence[cases.Shape]  # by model, image size and batch
    dtypes: Sequence[str]  # names of cases.DTYPES
    contenders: Sequence[str] | None = None  # None: all
    seconds: float = 0.5  # of rounds for an operation's direction, on a CPU
    model_seconds: float = 20.0  # of rounds for a model's contenders together, there


def hot_cases(op: str, shape: cases.Shape, device: torch.device) -> list[cases.Case]:
    """The cases of an operation that are timed there."""
    more = MORE_ON_CPU.get(op, ()) if device.type == "cpu" else ()
    return [
        case for case in cases.cases_of(op, shape) if (case.hot and "channels_last" not in case.variant) or case.variant in more
    ]


def plan(record: Record, ceilings: timing.Ceilings, choice: Choice) -> list[Task]:
    """The tasks of a choice, the most telling first."""
    c = choice
    implementations = None if c.contenders is None else {*c.contenders, operations.BASE}
    tasks: dict[str, list[Task]] = {part: [] for part in PARTS}
    on_cpu = c.device.type == "cpu"
    for dtype in c.dtypes:
        for shape in c.shapes:
            where = f"{shape.label} {dtype}"
            tasks["models"] += _model_tasks(record, ceilings, c, shape, dtype, training=False)
            for op in c.ops:
                for case in hot_cases(op, shape, c.device):
                    run = functools.partial(
                        operations.measure, record, ceilings, case, dtype, c.device, implementations, c.seconds
                    )
                    tasks["ops"].append(Task(f"{case.name} {where}", 2.5 * c.seconds + 1.0 if on_cpu else 8.0, run))
            tasks["training"] += _model_tasks(record, ceilings, c, shape, dtype, training=True)
        for op in c.ops:
            run = functools.partial(overhead.measure, record, op, dtype, c.device, c.seconds)
            tasks["overhead"].append(Task(f"overhead of {op} {dtype}", 2.5 * c.seconds + 0.5, run))
    return [task for part in PARTS if part in c.parts for task in tasks[part]]


def _model_tasks(record, ceilings, c: Choice, shape: cases.Shape, dtype: str, training: bool) -> list[Task]:
    """On a CPU one task, whose contenders take turns; on a GPU one for each of them."""
    on_cpu = c.device.type == "cpu"
    available = models.TRAINING if training else models.ON_CPU if on_cpu else models.ON_GPU
    everybody = models.chosen(available, _with_base(c.contenders, models.BASE))
    if training and on_cpu and c.contenders is None:  # a compiled step alone takes a minute to prepare
        everybody = [one for one in everybody if not one.mode]
    what, measure = ("training step", models.measure_training) if training else ("forward", models.measure)
    tasks = []
    for group in [everybody] if on_cpu else [[one] for one in everybody]:
        who = f"{len(group)} contenders" if on_cpu else group[0].name
        run = functools.partial(measure, record, shape, dtype, c.device, group, c.model_seconds)
        seconds = sum(one.seconds for one in group)
        if on_cpu:  # prepared, warmed up and checked in so many passes each
            passes = (30 if training else 8) * len(group)
            seconds += c.model_seconds + passes * _seconds_of_a_pass(shape, ceilings, dtype)
        else:
            seconds += 10.0 if training else 5.0
        tasks.append(Task(f"{shape.label} {dtype} {what}, {who}", seconds, run))
    return tasks


def _with_base(contenders: Sequence[str] | None, base: str) -> set[str] | None:
    return None if contenders is None else {*contenders, base}


def _seconds_of_a_pass(shape: cases.Shape, ceilings: timing.Ceilings, dtype: str) -> float:
    from vit_fast.benchmarks.roofline import model_flops

    flops = shape.batch * model_flops(shape.tokens, shape.width, shape.layers, shape.hidden, shape.patch)
    return 1.5 * flops / (ceilings.products_tflop_s[dtype] * 1e12)


def carry_out(record: Record, tasks: Sequence[Task], device: torch.device) -> Iterator[tuple[Task, int, float]]:
    """Does them one by one; before each it gives (the task, how many came before it, seconds that the rest may take).

    A task that a record holds already is left out. One that fails doesn't keep the others from being done.
    """
    tasks = [task for task in tasks if task.name not in record.data["done"]]
    guessed = taken = 0.0
    for i, task in enumerate(tasks):
        if record.seconds_left() < min(task.seconds, 8.0 + 0.3 * task.seconds):
            record.skip(f"{task.name}: out of time")
            continue
        pace = taken / guessed if guessed > 10 else 1.0  # how far off the estimates were
        yield task, i, min(pace * sum(t.seconds for t in tasks[i:]), max(0.0, record.seconds_left()))
        start = time.monotonic()
        try:
            task.run()
            record.finish(task.name)
        except torch.OutOfMemoryError:
            record.skip(f"{task.name}: out of memory")
        except Exception as failed:  # one broken measurement must not lose the others; it fails the run
            record.fail(f"{task.name}: {type(failed).__name__}: {' '.join(str(failed).split())[:300]}")
        guessed, taken = guessed + task.seconds, taken + time.monotonic() - start
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
