"""An operation's implementations on one case: each is held against float64 within the error budget, then timed.

Forward is timed without gradients, as in inference; backward alone, from outputs that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit_fast.ops  # noqa: F401  (fills OPERATIONS)
from vit_fast import backends
from vit_fast.benchmarks import timing
from vit_fast.benchmarks.cases import DTYPES, Case, Maker
from vit_fast.benchmarks.record import Record
from vit_fast.testing import error

PINNED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BASE = "torch"  # what speed-ups are against


def contenders(case: Case, arguments: tuple, names: Iterable[str] | None = None) -> dict[str, Callable | str]:
    """What can compute the case: a callable by name, or the reason why it can't.

    :param names: of implementations; all but the reference unless given. On a GPU attention is there twice more, with stock
        SDPA pinned to cuDNN and to flash.
    """
    operation = backends.OPERATIONS[case.op]
    found: dict[str, Callable | str] = {}
    for name, implementation in operation.implementations.items():
        if name in names if names is not None else name != "reference":
            found[name] = implementation.supports(*arguments) or implementation.run
    if case.op == "attention" and arguments[0].is_cuda and (names is None or BASE in names):
        stock = operation.implementations[BASE].run
        for name, backend in PINNED.items():

            def pinned(*arguments, backend=backend):
                with sdpa_kernel(backend):
                    return stock(*arguments)

            found[f"{BASE}+{name}"] = pinned
    return found


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]


def leaves(arguments: tuple) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def cotangents_for(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    make = Maker(outputs[0].device, outputs[0].dtype, seed)
    return [make(*o.shape, grad=False, dtype=o.dtype) for o in outputs]


def _floating(a) -> bool:
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def without_gradients(run: Callable, arguments: tuple):
    with torch.no_grad():
        return run(*arguments)


class Exact:
    """A case's results in float64 and in its own dtype by the reference, for the checks of all contenders."""

    def __init__(self, case: Case, arguments: tuple):
        self._case = case
        # Attention has no parameters: images are independent, and all of them in float64 would not fit.
        self._alone = case.op == "attention"
        self._images = sorted({0, case.shape.batch // 2, case.shape.batch - 1})
        run = backends.OPERATIONS[case.op].implementations["reference"].run
        own, wide = (
            tuple(to(self._some(a).detach()).requires_grad_(a.requires_grad) if _floating(a) else a for a in arguments)
            for to in (torch.clone, torch.Tensor.double)
        )
        with torch.no_grad():
            outputs = tensors(run(*own))
        # Drawn for the whole batch, so that contenders, which compute it whole, get the same ones.
        whole = [torch.empty(case.shape.batch, *o.shape[1:], dtype=o.dtype, device=o.device) for o in outputs]
        self.cotangents = cotangents_for(whole, seed=1)
        given = [self._some(c) for c in self.cotangents]
        self._own, self._wide = self._results(run, own, given), self._results(run, wide, given)

    def _some(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self._images] if self._alone else tensor

    def _shown(self, tensor: torch.Tensor, whole: bool) -> torch.Tensor:
        """A few images of what has an image axis; parameters' gradients entirely."""
        has_images = tensor.dim() > 1 and tensor.shape[0] == self._case.shape.batch
        if self._alone:
            return tensor[self._images] if whole else tensor
        return tensor[self._images] if has_images and self._case.shape.batch > 3 else tensor

    def _results(self, run, arguments, cotangents, whole: bool = False) -> dict[str, list[torch.Tensor]]:
        outputs = tensors(run(*arguments))
        cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves(arguments), cotangents)
        return {
            "forward": [self._shown(o.detach(), whole) for o in outputs],
            "backward": [self._shown(g, whole) for g in gradients],
        }

    def check(self, run, arguments) -> list[str]:
        """What breaks the error budget: a line each."""
        found = self._results(run, arguments, self.cotangents, whole=True)
        broken = []
        for direction, results in found.items():
            for i, (actual, own, wide) in enumerate(zip(results, self._own[direction], self._wide[direction], strict=True)):
                e = error(actual, own, wide)
                if not e.ok:
                    broken.append(f"{direction}[{i}]: error {e.value:.3e} over the budget {e.budget:.3e}")
        return broken


def measure(
    record: Record,
    ceilings: timing.Ceilings,
    case: Case,
    dtype: str,
    device: torch.device,
    names: Iterable[str] | None = None,
    seconds: float = 1.0,
) -> None:
    """Rows of one case, forward and backward.

    :param dtype: a name of `cases.DTYPES`. :param names: as for `contenders`. :param seconds: of rounds, on a CPU.
    """
    arguments = case.arguments(Maker(device, DTYPES[dtype], seed=0))
    where = f"{case.name} {case.shape.label} {dtype}"
    exact = Exact(case, arguments)
    runs = {}
    for name, run in contenders(case, arguments, names).items():
        if isinstance(run, str):
            record.skip(f"{where} {name}: {run}")
            continue
        try:
            broken = exact.check(run, arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refused:  # such as a pinned SDPA that has no kernel for this head size
            told = f"{where} {name}: {type(refused).__name__}: {' '.join(str(refused).split())[:200]}"
            record.skip(told) if "+" in name else record.fail(told)
            continue
        for line in broken:
            record.fail(f"{where} {name} {line}")
        if not broken:  # what is wrong has no time
            runs[name] = run
    labels = {"group": "operation", "op": case.op, "variant": case.variant, "shape": case.shape.label, "dtype": dtype}
    # A smoke run tries on a CPU what is done on a GPU.
    by_device = _on_gpu if device.type == "cuda" or record.data["environment"].get("smoke") else _on_cpu
    for direction in ("forward", "backward"):
        if runs:
            by_device(record, ceilings, case, direction, runs, arguments, exact, labels, device, seconds)


def _work_rates(ms: float, work, floor: float) -> dict[str, float]:
    return {
        "tflop_s": work.flops / ms / 1e9,
        "gb_s": work.bytes / ms / 1e6,
        "floor_ms": floor,
        "of_ceiling": floor / ms,
    }


def _on_cpu(record, ceilings, case, direction, runs, arguments, exact, labels, device, seconds) -> None:
    """Inputs stay the same from call to call: they are as warm as a block's are, coming from the operation before.

    So what memory allows is a copy of as many bytes in the same rounds, warm too.
    """
    work = case.work(direction, DTYPES[labels["dtype"]].itemsize)
    calls: dict[str, Callable] = {}
    for name, run in runs.items():
        if direction == "forward":
            calls[name] = functools.partial(without_gradients, run, arguments)
        else:
            given = (tensors(run(*arguments)), leaves(arguments), exact.cotangents)
            calls[name] = functools.partial(torch.autograd.grad, *given, retain_graph=True)
    source = torch.ones(int(work.bytes / 2), dtype=torch.uint8)  # reading and writing them moves as many
    target = torch.zeros_like(source)
    taken = timing.by_turns({**calls, "copy": functools.partial(target.copy_, source)}, seconds)
    copy = timing.summary(taken["copy"], "turns").ms
    floor = max(copy, ceilings.floor_ms(work.flops, 0.0, labels["dtype"]))
    for name in calls:
        timed = timing.summary(taken[name], "turns")
        ratio = timing.speed_up(taken[BASE], taken[name]) | {"against": BASE} if BASE in taken and name != BASE else {}
        record.row(
            timed, **labels, direction=direction, contender=name, checked=True, **_work_rates(timed.ms, work, floor), **ratio
        )


def _on_gpu(record, ceilings, case, direction, runs, arguments, exact, labels, device, seconds) -> None:
    """Inputs are rotated among copies that together pass the L2 cache."""
    dtype = labels["dtype"]
    work = case.work(direction, DTYPES[dtype].itemsize)
    sets = [arguments]
    for seed in range(1, timing.copies_for(work.bytes, device)):
        sets.append(case.arguments(Maker(device, DTYPES[dtype], seed)))
    floor = ceilings.floor_ms(work.flops, work.bytes, dtype)
    for name, run in runs.items():

        def prepare(run=run):
            return prepared(direction, run, sets, exact.cotangents)

        timed = timing.own_time(prepare, device)
        # What a single image costs when its launches are not in a graph.
        alone = {"eager_ms": timing.events(prepare(), device).ms} if case.shape.batch <= 8 else {}
        record.row(
            timed, **labels, direction=direction, contender=name, checked=True, **_work_rates(timed.ms, work, floor), **alone
        )


def prepared(direction: str, run: Callable, sets: list[tuple], cotangents: list[torch.Tensor]) -> timing.Calls:
    """A call for each set of arguments: forward without gradients, or backward from outputs computed here."""
    if direction == "forward":
        return [lambda a=a: without_gradients(run, a) for a in sets]
    outputs = [tensors(run(*a)) for a in sets]
    return [
        lambda o=o, a=a: torch.autograd.grad(o, leaves(a), cotangents, retain_graph=True)
        for o, a in zip(outputs, sets, strict=True)
    ]
