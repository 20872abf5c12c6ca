"""How long calls take on a device, and the ceilings to hold them against.

On a GPU: medians of device-event timings. Equivalent calls on different buffers are taken in turn, so that no call finds its
inputs in the cache; inside a CUDA graph no launch gaps are counted: that is an operation's own time. On a CPU: several calls
by turns, A B A B …, so that a drifting machine meets all of them alike.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    ms: float  # median
    p20: float
    p80: float
    samples: int
    method: str  # "graph", "events", or "turns"


def summary(samples: Sequence[float], method: str) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, method)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), cuts[1], cuts[7], len(samples), method)


# ---- CPUs -----------------------------------------------------------------------------------------------------------


def by_turns(
    calls: dict[str, Callable], seconds: float, least: int = 7, most: int = 400, at_once_ms: float = 2.0, pause_ms: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; a round takes every call once, or a short one several times.

    :param seconds: for all rounds, if that gives at least ``least`` of them. :param at_once_ms: what is shorter is repeated.
    :param pause_ms: before each call: threads of the one before, of another library perhaps, wait actively for a while.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(1e-3 * at_once_ms / max(time.perf_counter() - start, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            time.sleep(1e-3 * pause_ms)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return taken


def speed_up(base: Sequence[float], taken: Sequence[float]) -> dict[str, float]:
    """base / taken round by round, as the columns of a row: the median of the ratios and its 20th and 80th percentile."""
    ratios = summary([b / t for b, t in zip(base, taken, strict=True)], "turns")
    return {"speed_up": ratios.ms, "speed_up_p20": ratios.p20, "speed_up_p80": ratios.p80}


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def events(calls: Calls, device: torch.device, target_ms: float = 80.0, most: int = 400) -> Timing:
    """Each call between two events on the stream. Gaps count where the host can't keep up: that is what a user of it sees.

    On a CPU, for smoke runs: the first call once.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return summary([1e3 * (time.perf_counter() - start)], "turns")
    for call in calls:  # compiles, fills caches, warms up
        call()
    torch.cuda.synchronize(device)
    estimate = _between_events([calls[0]])[0]
    repeats = max(10, min(most, int(target_ms / max(estimate, 1e-3))))
    return summary(_between_events([calls[i % len(calls)] for i in range(repeats)]), "events")


def _between_events(calls: Calls) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    for call, (start, end) in zip(calls, pairs, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def graph(prepare: Callable[[], Calls], device: torch.device, target_ms: float = 80.0) -> Timing:
    """The calls in one CUDA graph, replayed: time of a replay divided by the calls in it.

    ``prepare`` makes the calls; it runs on the stream that is captured, because a backward pass runs on its forward's stream.
    RuntimeError where the calls can't be captured.
    """
    if device.type != "cuda":
        return events(prepare(), device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = prepare()
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        results = [call() for call in calls]  # kept: memory given back inside the graph would be shared by the calls
    replays = events([captured.replay], device, target_ms)
    del results
    scale = 1 / len(calls)
    return Timing(replays.ms * scale, replays.p20 * scale, replays.p80 * scale, replays.samples, "graph")


def own_time(prepare: Callable[[], Calls], device: torch.device, target_ms: float = 80.0) -> Timing:
    """`graph`; where that fails, such as for an operation that synchronises, `events`."""
    try:
        return graph(prepare, device, target_ms)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize(device)
        return events(prepare(), device, target_ms)


def copies_for(bytes_a_call: float, device: torch.device, most: int = 64) -> int:
    """How many sets of buffers to rotate among, so that together they pass twice the L2 cache and fit in a third of memory."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    wanted = math.ceil(2 * properties.L2_cache_size / max(bytes_a_call, 1)) + 1
    fitting = int(torch.cuda.mem_get_info(device)[0] / 3 / max(bytes_a_call, 1))
    return max(1, min(max(2, wanted), most, max(fitting, 1)))


# ---- Ceilings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run with a large copy, and with a large product of each dtype."""

    copy_tb_s: float
    products_tflop_s: dict[str, float]

    def floor_ms(self, flops: float, bytes_moved: float, dtype: str) -> float:
        return 1e3 * max(flops / (self.products_tflop_s[dtype] * 1e12), bytes_moved / (self.copy_tb_s * 1e12))


def measure_ceilings(device: torch.device, dtypes: dict[str, torch.dtype], tiny: bool = False) -> Ceilings:
    """A large copy, which moves twice its size, and products of square matrices; random data, for zeros run faster.

    On a GPU 1 GiB and 8192³, on a CPU 256 MiB, and 1536³ for at least a third of a second, the better of torch's own product
    and oneDNN's with packed weights; ``tiny`` is for smoke runs.
    """
    real, on_gpu = not tiny, device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
    size = 1 << 16 if tiny else min(1 << 29, room // 16) if on_gpu else 1 << 27  # elements of two bytes
    source = torch.empty(size, device=device, dtype=torch.int16).random_()
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    bandwidth = 4 * size / _ceiling_ms(copy, device, real) / 1e9
    del source, target, copy
    side = 64 if tiny else 8192 if on_gpu else 1536
    products = {}
    for name, dtype in dtypes.items():
        with _tf32(name == "tf32"):
            x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            ways = [lambda x=x, y=y: x @ y, *_packed_product(x, y)]
            products[name] = 2 * side**3 / min(_ceiling_ms(way, device, real) for way in ways) / 1e9
    return Ceilings(bandwidth, products)


def _packed_product(x: torch.Tensor, y: torch.Tensor) -> list[Callable]:
    """oneDNN's product, where there is one."""
    from vit_fast.frozen.products import OneDnn

    if x.device.type != "cpu" or not OneDnn.serves(x.dtype):
        return []
    return [functools.partial(OneDnn(y, None), x)]


def _ceiling_ms(call: Callable, device: torch.device, real: bool) -> float:
    if device.type != "cuda" and real:
        return min(by_turns({"it": call}, 0.35, least=3)["it"])  # a ceiling is the best that was seen
    return events([call], device, most=100).ms


@contextlib.contextmanager
def _tf32(on: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
