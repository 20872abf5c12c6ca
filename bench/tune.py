#!/usr/bin/env python3
"""Time other launch configurations of the kernels on this GPU, and propose those that win.

    python bench/tune.py [--ops attention,mlp] [--models B,L] [--images 224] [--batches 128,1] [--dtypes bf16] [--json FILE]

Every kernel file chooses its launches by pure functions, `*_config(...)`. For each call of one that a case makes, its result
is replaced by its neighbours: other tile sizes, warps, stages. A neighbour must compile, keep the error budget and then be
faster. What wins is printed with the function and the arguments it was chosen for, to be written into the kernel file's table
and looked at in the compile report. Nothing is changed by this program. Exit code 2 without a CUDA device.
--smoke tries two neighbours of every choice at a tiny shape on the CPU, to try the program itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == "__main__" and "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import cases  # noqa: E402
import gpu  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402

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


def tune_case(case: cases.Case, dtype: str, device: torch.device, most: int | None) -> list[dict]:
    """The proposals for one case, as rows."""
    torch_dtype = cases.DTYPES[dtype]
    arguments = [case.arguments(cases.Maker(device, torch_dtype, seed=0))]
    run = gpu.contenders(case, arguments[0]).get("triton", "there is no Triton implementation")
    label = f"{case.name} {case.shape.label} {dtype}"
    if isinstance(run, str):
        print(f"{label}: {run}")
        return []
    exact = gpu.Exact(case, arguments[0])
    needed = case.work("backward", torch_dtype.itemsize).bytes
    arguments += [case.arguments(cases.Maker(device, torch_dtype, s)) for s in range(1, timing.copies_for(needed, device))]

    def forward():
        return [lambda a=a: gpu._without_gradients(run, a) for a in arguments]

    def backward():
        outputs = [gpu.tensors(run(*a)) for a in arguments]
        return [
            lambda o=o, a=a: torch.autograd.grad(o, gpu.leaves(a), exact.cotangents, retain_graph=True)
            for o, a in zip(outputs, arguments, strict=True)
        ]

    rows = []
    for direction, prepare in (("forward", forward), ("backward", backward)):
        calls = prepare()
        calls[0]()
        functions = config_functions()
        for (name, asked_with), config in choices_of(functions, calls[0]).items():
            row = _tune_choice(name, functions[name], asked_with, config, prepare, exact, run, arguments[0], device, most)
            row |= {"op": case.op, "variant": case.variant, "shape": case.shape.label, "dtype": dtype, "direction": direction}
            rows.append(row)
            shown = ", ".join(str(getattr(a, "arch", a)) for a in asked_with)
            print(f"{label} {direction}: {name}({shown})")
            print(f"    default  {row['default_ms']:.4f} ms  {config}")
            gain = "" if row["best"] is None else f"  ({row['best_ms'] / row['default_ms']:.2f} of the default)"
            print(f"    proposed {row['best_ms']:.4f} ms  {row['best']}{gain}" if row["best"] else "    nothing is faster")
            print(f"    {row['tried']} tried, {row['refused']} did not run, {row['wrong']} broke the error budget", flush=True)
    return rows


def _tune_choice(name, function, asked_with, config, prepare, exact, run, arguments, device, most) -> dict:
    default = timing.own_time(prepare, device, 30.0).ms
    row = {"function": name, "default": str(config), "default_ms": default, "best": None, "best_ms": default}
    row |= {"tried": 0, "refused": 0, "wrong": 0}
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
            row["best"], row["best_ms"] = str(candidate), ms
    return row


# ---- Command line ---------------------------------------------------------------------------------------------------


def _list(kind: Callable, allowed=None) -> Callable:
    def parse(text: str) -> list:
        chosen = []
        for part in text.split(","):
            try:
                value = kind(part.strip())
            except ValueError:
                raise argparse.ArgumentTypeError(f"{part!r} is not a number") from None
            if allowed is not None and value not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(map(str, allowed))}")
            chosen.append(value)
        return chosen

    return parse


def main(argv: list[str] | None = None) -> int:
    p = gpu._Parser(prog="tune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ops", type=_list(str, cases.OPS), default=list(cases.OPS), help=f"of {', '.join(cases.OPS)}")
    p.add_argument("--models", type=_list(str, cases.MODELS), default=["B"], help=f"of {', '.join(cases.MODELS)} (default: B)")
    p.add_argument("--images", type=_list(int), default=[224], help="pixels a side (default: 224)")
    p.add_argument("--batches", type=_list(int), default=[128, 1], help="(default: 128,1)")
    p.add_argument("--dtypes", type=_list(str, cases.DTYPES), default=["bf16"], help="(default: bf16)")
    p.add_argument("--json", metavar="FILE", help="write every row there too")
    p.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU, to try this program")
    args = p.parse_args(argv)
    if not args.smoke and not torch.cuda.is_available():
        print("tune.py: no CUDA device (--smoke tries the program on the CPU)", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.smoke else "cuda")
    shapes = [cases.shape_of(m, i, b) for m in args.models for i in args.images for b in args.batches]
    rows = []
    for shape in [gpu.TINY] if args.smoke else shapes:
        for op in args.ops:
            for case in cases.cases_of(op, shape):
                for dtype in ["fp32"] if args.smoke else args.dtypes:
                    if case.hot:
                        rows += tune_case(case, dtype, device, 2 if args.smoke else None)
    proposals = [row for row in rows if row["best"]]
    if args.json:
        environment = gpu.environment_of(device, args.smoke)
        Path(args.json).write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} choices looked at, {len(proposals)} proposals{': smoke, they mean nothing' if args.smoke else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
