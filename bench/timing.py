"""How long calls take on a device: medians of device-event timings over rotated buffers, and the ceilings to hold them against.

Equivalent calls on different buffers are taken in turn, so that no call finds its inputs in the cache. Inside a CUDA graph no
launch gaps are counted: that is an operation's own time. On the CPU (smoke runs) one call is timed; the figure means nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable
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
    method: str  # "graph", "events", or "cpu"


def _summary(samples: list[float], method: str) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, method)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), cuts[1], cuts[7], len(samples), method)


def events(calls: Calls, device: torch.device, target_ms: float = 80.0, most: int = 400) -> Timing:
    """Each call between two events on the stream. Gaps count where the host can't keep up: that is what a user of it sees."""
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return _summary([1e3 * (time.perf_counter() - start)], "cpu")
    for call in calls:  # compiles, fills caches, warms up
        call()
    torch.cuda.synchronize(device)
    estimate = _between_events([calls[0]])[0]
    repeats = max(10, min(most, int(target_ms / max(estimate, 1e-3))))
    return _summary(_between_events([calls[i % len(calls)] for i in range(repeats)]), "events")


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


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run with a large copy, and with a large product of each dtype."""

    copy_tb_s: float
    products_tflop_s: dict[str, float]

    def floor_ms(self, flops: float, bytes_moved: float, dtype: str) -> float:
        return 1e3 * max(flops / (self.products_tflop_s[dtype] * 1e12), bytes_moved / (self.copy_tb_s * 1e12))


def measure_ceilings(device: torch.device, dtypes: dict[str, torch.dtype]) -> Ceilings:
    """A copy of 1 GiB, which moves twice that, and products of 8192³; random data, for zeros run faster."""
    real = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] if real else 0
    size = min(1 << 29, room // 16) if real else 1 << 16
    source = torch.empty(size, device=device, dtype=torch.int16).random_()
    target = torch.empty_like(source)
    bandwidth = 4 * size / events([functools.partial(target.copy_, source)], device).ms / 1e9
    del source, target
    side = 8192 if real else 64
    products = {}
    for name, dtype in dtypes.items():
        with _tf32(name == "tf32"):
            x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            ms = events([lambda x=x, y=y: x @ y], device, most=100).ms
        products[name] = 2 * side**3 / ms / 1e9
    return Ceilings(bandwidth, products)


@contextlib.contextmanager
def _tf32(on: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
