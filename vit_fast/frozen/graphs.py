"""CUDA graphs of a forward pass: one launch in place of some hundred, captured per batch size when one is first used.

Batches are rounded up to a few sizes (`bucket`), so that ragged ones don't capture a graph each. All graphs of a model share
one pool of memory, so they run one at a time: a lock orders the threads, an event the streams. Results are copied out of the
pool before anything else runs in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2  # runs before a capture: they compile kernels, and let libraries choose and allocate


def bucket(batch: int) -> int:
    """The batch size that a batch is computed at: exact up to 16, then with four leading binary digits: at most 12.5 % more."""
    step = 1 << max(0, (batch - 1).bit_length() - 4)
    return -(-batch // step) * step


class _Captured:
    def __init__(self, graph: Any, images: Tensor, results: dict[str, Any]):
        self.graph, self.images, self.results = graph, images, results


class Graphs:
    """Captures and replays ``run(images) -> {name: tensor or list of tensors}``, one graph for each key and batch size."""

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.captured: dict[Hashable, _Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.finished = torch.cuda.Event()

    def __call__(
        self, key: Hashable, images: Tensor, dtype: torch.dtype, run: Callable[[Tensor], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``run`` gives for the images, which are cast to ``dtype`` on the way in. The results are the caller's own."""
        batch = images.shape[0]
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.finished)  # whoever used the pool last, on another stream maybe, has copied its results
            captured = self._captured(key, images, dtype, run)
            if images.data_ptr() != captured.images.data_ptr():  # else it was filled in place: see `input`
                captured.images[:batch].copy_(images, non_blocking=True)
            captured.graph.replay()
            results = {name: _copied(value, batch) for name, value in captured.results.items()}
            self.finished.record(stream)
        return results

    def input(self, key: Hashable, like: Tensor, dtype: torch.dtype, run: Callable[[Tensor], dict[str, Any]]) -> Tensor:
        """The memory that the graph for batches like this one reads, [batch, …]: what is written there is not copied."""
        with self.lock, torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.finished)
            return self._captured(key, like, dtype, run).images[: like.shape[0]]

    def clear(self) -> None:
        with self.lock:
            self.finished.synchronize()
            self.captured.clear()

    def _captured(
        self, key: Hashable, images: Tensor, dtype: torch.dtype, run: Callable[[Tensor], dict[str, Any]]
    ) -> _Captured:
        size = bucket(images.shape[0])
        key = (key, size, images.shape[1:], _channels_last(images))
        if key not in self.captured:
            layout = torch.channels_last if _channels_last(images) else torch.contiguous_format
            static = torch.zeros((size, *images.shape[1:]), device=self.device, dtype=dtype).contiguous(memory_format=layout)
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run(static)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with work of their own while this one captures.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                results = run(static)
            self.captured[key] = _Captured(graph, static, results)
        return self.captured[key]


def _channels_last(images: Tensor) -> bool:
    return images.shape[1] > 1 and images.stride(1) == 1


def _copied(value: Tensor | list[Tensor], batch: int) -> Tensor | list[Tensor]:
    return [_copied(v, batch) for v in value] if isinstance(value, list) else value[:batch].clone()
