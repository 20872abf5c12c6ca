"""Other launch configurations of the Triton kernels, timed on this GPU.

Every kernel file chooses its launches by pure functions, `*_config(...)`. For each call of one that a case makes, its result
is replaced by its neighbours: other tile sizes, warps, stages. A neighbour must compile, keep the error budget and then be
faster. What wins is in force where `vit_fast.tuning` keeps it, and is worth writing into the kernel file's table, after a look
at the compile report.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from vit_fast.benchmarks import timing
from vit_fast.benchmarks.cases import DTYPES, Case, Maker
from vit_fast.benchmarks.operations import Exact, contenders, prepared

# What is varied, by the names that the kernel files give it in dictionaries and named tuples.
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
AXES = {
    "num_warps": WARPS,
    "warps": WARPS,
    "num_stages": STAGES,
    "stages": STAGES,
    "ROWS": (16, 32, 64, 128),
    "COLUMNS": (32, 64, 128),
    "rows": (32, 64, 128, 256),
    "columns": (32, 64, 128, 256),
    "depth": (32, 64, 128),
}
# Plain tuples have no names: which of a function's results is what.
POSITIONS = {
    "layer_norm.forward_config": {0: (1, 2, 4, 8, 16), 2: WARPS},
    "layer_norm.backward_config": {0: (1, 2, 4, 8, 16), 2: (4, 8, 16), 3: STAGES},
}
WORTH = 0.98  # a proposal takes at most this part of the default's time


def neighbours(name: str, config) -> Iterator:
    """Configurations that differ from one in one or two of its choices, nearest first."""
    if isinstance(config, dict):
        axes = {key: AXES[key] for key in config if key in AXES}
    elif hasattr(config, "_fields"):
        axes = {key: AXES[key] for key in config._fields if key in AXES}
    else:
        axes = POSITIONS.get(name, {})
    for count in (1, 2):
        for keys in itertools.combinations(axes, count):
            for values in itertools.product(*(axes[key] for key in keys)):
                other = _replaced(config, dict(zip(keys, values, strict=True)))
                # Two changes at once only where both are changes: the rest came with one.
                if sum(_get(other, key) != _get(config, key) for key in keys) == count:
                    yield other


def _get(config, key):
    return getattr(config, key) if hasattr(config, "_fields") else config[key]


def _replaced(config, changes: dict):
    if isinstance(config, dict):
        return config | changes
    if hasattr(config, "_fields"):
        return config._replace(**changes)
    return tuple(changes.get(i, value) for i, value in enumerate(config))


# ---- Choices, watched and overridden --------------------------------------------------------------------------------


def _kernel_modules() -> list[types.ModuleType]:
    """Those that are loaded: operations load their kernels when they first run."""
    return [module for name, module in list(sys.modules.items()) if name.startswith("vit_fast.kernels.")]


def config_functions() -> dict[str, Callable]:
    """Every launch choice of the loaded kernel modules by its name, `module.function`."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in _kernel_modules()
        for name, value in vars(module).items()
        if name.endswith("_config") and getattr(value, "__module__", None) == module.__name__
    }


@contextmanager
def replaced(function: Callable, other: Callable):
    """Every kernel module that holds the function holds the other one inside."""
    holders = [(module, name) for module in _kernel_modules() for name, value in vars(module).items() if value is function]
    for module, name in holders:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name in holders:
            setattr(module, name, function)


def choices_of(functions: dict[str, Callable], call: Callable[[], object]) -> dict[tuple[str, tuple], object]:
    """{(function's name, arguments): configuration} of what the call asks for."""
    asked: dict[tuple[str, tuple], object] = {}

    def watching(name, function):
        def watch(*arguments):
            asked[name, arguments] = config = function(*arguments)
            return config

        return watch

    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(replaced(function, watching(name, function)))
        call()
    return asked


# ---- One case -------------------------------------------------------------------------------------------------------


def tune_case(
    case: Case, dtype: str, device: torch.device, most: int | None = None, say: Callable[[str], None] = print
) -> list[dict]:
    """What was tried for one case: a row for each choice of a launch that it asks for, ``config`` being what `tuned` takes.

    :param most: neighbours of each choice at most.
    """
    arguments = [case.arguments(Maker(device, DTYPES[dtype], seed=0))]
    label = f"{case.name} {case.shape.label} {dtype}"
    run = contenders(case, arguments[0], ("triton",)).get("triton", "there is no Triton implementation")
    if isinstance(run, str):
        say(f"{label}: {run}")
        return []
    exact = Exact(case, arguments[0])
    needed = case.work("backward", DTYPES[dtype].itemsize).bytes
    arguments += [case.arguments(Maker(device, DTYPES[dtype], s)) for s in range(1, timing.copies_for(needed, device))]
    rows = []
    for direction in ("forward", "backward"):

        def prepare(direction=direction):
            return prepared(direction, run, arguments, exact.cotangents)

        calls = prepare()
        calls[0]()
        functions = config_functions()
        for (name, asked_with), config in choices_of(functions, calls[0]).items():
            row = _tune_choice(name, functions[name], asked_with, config, prepare, exact, run, arguments[0], device, most)
            row |= {"op": case.op, "variant": case.variant, "shape": case.shape.label, "dtype": dtype, "direction": direction}
            rows.append(row)
            shown = ", ".join(str(getattr(a, "arch", a)) for a in asked_with)
            say(f"{label} {direction}: {name}({shown})")
            say(f"    default  {row['default_ms']:.4f} ms  {config}")
            gain = "" if row["config"] is None else f"  ({row['best_ms'] / row['default_ms']:.2f} of the default)"
            say(f"    proposed {row['best_ms']:.4f} ms  {row['config']}{gain}" if row["config"] else "    nothing is faster")
            say(f"    {row['tried']} tried, {row['refused']} did not run, {row['wrong']} broke the error budget")
    return rows


def _tune_choice(name, function, asked_with, config, prepare, exact, run, arguments, device, most) -> dict:
    from vit_fast.kernels.common import launch_arguments

    default = timing.own_time(prepare, device, 30.0).ms
    row = {"function": name, "arguments": list(launch_arguments(asked_with)), "default": str(config), "default_ms": default}
    row |= {"config": None, "best_ms": default, "tried": 0, "refused": 0, "wrong": 0}
    for candidate in itertools.islice(neighbours(name, config), most):
        row["tried"] += 1

        def choose(*asked, candidate=candidate):
            return candidate if asked == asked_with else function(*asked)

        with replaced(function, choose):
            try:
                broken = exact.check(run, arguments)
                ms = timing.own_time(prepare, device, 30.0).ms if not broken else None
            except Exception as refused:  # too much shared memory, a tile the compiler can't take, ...
                if device.type == "cuda" and "illegal" in str(refused):
                    raise  # the device's context is lost: nothing after it would run
                row["refused"] += 1
                continue
        if broken:
            row["wrong"] += 1
        elif ms < WORTH * row["best_ms"]:
            row["config"], row["best_ms"] = _changed(config, candidate), ms
    return row


def _changed(config, candidate) -> list | dict:
    """What a file keeps of a candidate: of a dictionary what differs, else all of it."""
    if isinstance(config, dict):
        return {name: value for name, value in candidate.items() if value != config[name]}
    return list(candidate)


def launches_of(rows: list[dict]) -> list[dict]:
    """The rows that won, as `vit_fast.tuning` keeps them."""
    return [{name: row[name] for name in ("function", "arguments", "config")} for row in rows if row["config"] is not None]
