"""The benchmarks on pytest-benchmark: `pytest bench`, or one file of them.

Each is one implementation or one model on one case, whose result is checked before it is timed. pytest-benchmark times them one
after another: for ratios on a machine that drifts, `vit-fast bench` takes them by turns. On a GPU the clock is the device's.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does when it is unset, less a warning

import pytest
import torch

from vit_fast.benchmarks import cases, models, operations, suite, timing
from vit_fast.benchmarks.cases import DTYPES, MODELS, Maker

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def pytest_addoption(parser):
    group = parser.getgroup("vit_fast")
    group.addoption("--models", default="B", help=f"comma-separated, of {', '.join(MODELS)} (default: B)")
    group.addoption("--image", default="224", help="pixels a side, comma-separated (default: 224)")
    group.addoption("--batch", default="1,8,32,128,256" if GPU else "1,8", help="images, comma-separated")
    group.addoption("--dtypes", default="bfloat16" if GPU else "float32", help=f"comma-separated, of {', '.join(NAMES)}")


def _shapes(config) -> list[cases.Shape]:
    def parts(name):
        return [part.strip() for part in config.getoption(name).split(",")]

    try:
        shapes = [
            cases.shape_of(m, int(i), int(b)) for m in parts("--models") for i in parts("--image") for b in parts("--batch")
        ]
    except (KeyError, ValueError) as error:
        raise pytest.UsageError(f"--models, --image or --batch: {error}") from None
    if wrong := [shape.label for shape in shapes if shape.image % shape.patch or shape.batch < 1]:
        raise pytest.UsageError(f"no such shapes: {', '.join(wrong)}")
    return shapes


def _dtypes(config) -> list[str]:
    names = [name.strip() for name in config.getoption("--dtypes").split(",")]
    if wrong := [name for name in names if name not in NAMES]:
        raise pytest.UsageError(f"--dtypes: {', '.join(wrong)} is not of {', '.join(NAMES)}")
    return [NAMES[name] for name in names]


def pytest_generate_tests(metafunc):
    fixtures = metafunc.fixturenames
    if "case" in fixtures:
        found = [
            (case, dtype, direction, name)
            for dtype in _dtypes(metafunc.config)
            for shape in _shapes(metafunc.config)
            for case in suite.hot_cases(metafunc.module.OPERATION, shape, DEVICE)
            for direction in ("forward", "backward")
            for name in _implementations(case)
        ]
        ids = [f"{c.variant or 'plain'} {c.shape.label} {dtype} {direction} {name}" for c, dtype, direction, name in found]
        metafunc.parametrize("case, dtype, direction, name", found, ids=ids)
    elif "contender" in fixtures:
        training = "training" in metafunc.function.__name__
        contenders = models.TRAINING if training else models.ON_GPU if GPU else models.ON_CPU
        found = [(s, dtype, c) for dtype in _dtypes(metafunc.config) for s in _shapes(metafunc.config) for c in contenders]
        ids = [f"{s.label} {dtype} {c.name}" for s, dtype, c in found]
        metafunc.parametrize("shape, dtype, contender", found, ids=ids)


def _implementations(case: cases.Case) -> list[str]:
    names = [name for name in operations.backends.OPERATIONS[case.op].implementations if name != "reference"]
    return names + [f"{operations.BASE}+{pinned}" for pinned in operations.PINNED] * (GPU and case.op == "attention")


# ---- The device's clock ---------------------------------------------------------------------------------------------


class DeviceClock:
    """Seconds that the device has worked, as far as anybody measured them.

    pytest-benchmark looks at it before and after a call, and before that for its precision: each look takes a nanosecond.
    """

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-9
        return self.seconds

    def running(self, call):
        """The call, after which the clock has advanced by its time on the device."""

        def run():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            self.seconds += 1e-3 * start.elapsed_time(end)

        return run


CLOCK = DeviceClock()


def pytest_collection_modifyitems(items):
    if GPU:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def time_it(benchmark):
    """Times the calls in turn, which a GPU finds in different buffers."""

    def take(calls: timing.Calls, group: str, rounds: int = 0):
        benchmark.group = group
        turns = iter(range(1 << 60))

        def call():
            calls[next(turns) % len(calls)]()

        call()
        run = CLOCK.running(call) if GPU else call
        if rounds:
            benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
        else:
            benchmark(run)

    return take


# ---- What is timed --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _exact(name: str, shape: cases.Shape, dtype: str):
    case = next(c for c in suite.hot_cases(name.split()[0], shape, DEVICE) if c.name == name)
    arguments = case.arguments(Maker(DEVICE, DTYPES[dtype], seed=0))
    return arguments, operations.Exact(case, arguments)


@pytest.fixture
def operation(case, dtype, direction, name, time_it):
    """Times one implementation of an operation in one direction."""

    def take():
        arguments, exact = _exact(case.name, case.shape, dtype)
        run = operations.contenders(case, arguments, {operations.BASE, name}).get(name)
        if isinstance(run, str) or run is None:
            pytest.skip(run or "no such implementation here")
        broken = exact.check(run, arguments)
        assert broken == [], "over the error budget"
        sets = [arguments]
        if GPU:
            work = case.work(direction, DTYPES[dtype].itemsize)
            copies = timing.copies_for(work.bytes, DEVICE)
            sets += [case.arguments(Maker(DEVICE, DTYPES[dtype], seed)) for seed in range(1, copies)]
        group = f"{case.name} {case.shape.label} {dtype} {direction}"
        time_it(operations.prepared(direction, run, sets, exact.cotangents), group)

    return take
