"""Whole models, forward and training step: ours and other packages', each way that people run them.

A contender is a source and how it is run, ``timm compiled``. All compute the same function of the same weights, so each is held
against the same float64 results before it is timed: ours within the error budget of the project, others' within ten times that.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from vit_fast import backends, freeze
from vit_fast.benchmarks import peers, timing
from vit_fast.benchmarks.cases import DTYPES, MODELS, Shape
from vit_fast.benchmarks.memory import kept_bytes
from vit_fast.benchmarks.operations import PINNED
from vit_fast.benchmarks.peers import Missing
from vit_fast.benchmarks.record import Record
from vit_fast.benchmarks.roofline import model_flops
from vit_fast.configs import CONFIGS
from vit_fast.modeling import VisionTransformer
from vit_fast.testing import Error, error

CLASSES = 1000
CHECKED = 8  # images whose results are looked at
BASE = "reference"  # what speed-ups are against
FROZEN, FROZEN_ALL = "freeze()", "freeze() all on"
# Frozen for any batch, inductor takes oneDNN's products, for a certain one MKL's: which is faster depends on the processor.
MODES = ("compiled", "max-autotune", "inductor-frozen", "inductor-frozen any-batch", "graphed")


@dataclass(frozen=True)
class Contender:
    """Who computes, and how it is run."""

    source: str
    mode: str = ""  # of MODES; eager if none
    pinned: str = ""  # stock SDPA's backend

    @classmethod
    def named(cls, name: str) -> Contender:
        name, _, pinned = name.partition(" +")
        mode = max((mode for mode in MODES if name.endswith(" " + mode)), key=len, default="")
        return cls(name.removesuffix(" " + mode) if mode else name, mode, pinned)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.source, self.mode, self.pinned and f"+{self.pinned}")))

    @property
    def ours(self) -> bool:
        return self.source.startswith(("plain", "freeze", BASE))

    def is_called(self, pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in (self.name, self.name.replace("()", "")))

    @property
    def seconds(self) -> float:
        """A guess at how long it takes to prepare, two threads and B/16."""
        return {"": 4.0, "graphed": 5.0, "max-autotune": 150.0}.get(self.mode, 35.0)


def _named(*names: str) -> tuple[Contender, ...]:
    return tuple(map(Contender.named, names))


# The most telling first: time may not be enough for all.
ON_CPU = _named(
    BASE, "plain", FROZEN, "original inductor-frozen", "original inductor-frozen any-batch", "openvino", "onnxruntime", "timm",
    "transformers", "torchvision", FROZEN_ALL, "original", "original compiled", "timm inductor-frozen",
    "transformers inductor-frozen", "torchvision inductor-frozen", "plain torch", "plain compiled", "timm compiled",
    "transformers compiled", "torchvision compiled",
)  # fmt: skip
ON_GPU = _named(
    FROZEN, "timm", "timm compiled", "plain", "timm max-autotune", "timm graphed", "timm +cudnn", "timm +flash", BASE,
    FROZEN_ALL, "plain torch", "plain graphed", "timm compiled +cudnn", "timm compiled +flash", "plain compiled",
    "transformers", "transformers compiled", "torchvision", "torchvision compiled", "original", "original compiled",
)  # fmt: skip
TRAINING = _named(
    BASE, "plain", "plain torch", "timm", "timm compiled", "plain compiled", "original", "transformers", "torchvision"
)


def chosen(available: Sequence[Contender], wanted: Iterable[str] | None) -> list[Contender]:
    """Those whose name is wanted, or fits a pattern that is, such as ``timm*``; ``freeze`` is short for ``freeze()``."""
    if wanted is None:
        return list(available)
    return [c for c in available if any(c.is_called(name) for name in wanted)]


# ---- What they compute ----------------------------------------------------------------------------------------------


class Subject:
    """A model with random weights, images for it, and what it gives for them in float64 and by the reference."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        config = copy.deepcopy(CONFIGS[MODELS[shape.model]])
        config.transformer.update(dropout_rate=0.0, num_layers=shape.layers)
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = VisionTransformer(config, shape.image, num_classes=CLASSES)
        embeddings = model.transformer.embeddings
        for table in (embeddings.cls_token, embeddings.position_embeddings):  # zeros until they are trained
            nn.init.normal_(table, std=0.02)
        torch.random.set_rng_state(generator)
        self.model = model.eval().to(device, DTYPES[dtype])
        # Bytes, for the contender that takes them; the others get the same images normalised.
        make = torch.Generator().manual_seed(1)
        size = (max(CHECKED, shape.batch), 3, shape.image, shape.image)
        self.bytes = torch.randint(0, 256, size, dtype=torch.uint8, generator=make).to(device)
        self.labels = torch.randint(0, CLASSES, (shape.batch,), generator=make).to(device)
        self._logits: tuple[Tensor, Tensor] | None = None
        self._training: tuple[list[Tensor], list[Tensor]] | None = None

    def images(self, first: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
        normalised = (self.bytes[first : first + count].float() / 255 - 0.5) / 0.5
        return normalised.to(DTYPES[self.dtype] if dtype is None else dtype)

    def checked(self) -> tuple[Tensor, Tensor]:
        """Logits of the first images, by the reference in the contenders' dtype, and in float64."""
        if self._logits is None:
            with torch.no_grad(), backends.use("reference"):
                own = self.model(self.images(0, CHECKED))[0]
                wide = copy.deepcopy(self.model).double()
                # In float64 but from what the contenders are given.
                exact = torch.cat([wide(self.images(i, 1).double())[0] for i in range(CHECKED)])
            self._logits = own, exact
        return self._logits

    def checked_training(self) -> tuple[list[Tensor], list[Tensor]]:
        """Loss and its gradient by the images, likewise."""
        if self._training is None:
            self._training = _loss_and_gradient(self, wide=False), _loss_and_gradient(self, wide=True)
        return self._training

    def check(self, run: Callable[[Tensor], Tensor], raw: bool, ours: bool = True) -> str | None:
        """What is wrong with the logits; None if they are within the budget.

        :param run: takes ``shape.batch`` images. :param raw: it takes bytes. :param ours: see `_told`.
        """
        batch, own, exact = self.shape.batch, *self.checked()
        give = (lambda first: self.bytes[first : first + batch]) if raw else (lambda first: self.images(first, batch))
        # A small batch several times: the largest error of few values varies by chance.
        times = max(1, min(4, CHECKED // batch))
        found = torch.cat([run(give(i * batch)).clone() for i in range(times)])[:CHECKED]
        few = len(found)
        e = error(found, own[:few], exact[:few])
        return _told("logits", e, ours)


OTHERS = 10  # budgets: that computes the same function, if by other rules than ours


def _told(what: str, e: Error, ours: bool) -> str | None:
    budget = e.budget if ours else OTHERS * e.budget
    return None if e.value <= budget else f"{what}: error {e.value:.3e} over the budget {budget:.3e}"


@functools.lru_cache(maxsize=1)
def subject_of(shape: Shape, dtype: str, device: torch.device) -> Subject:
    """The last one is kept: on a GPU its contenders come one at a time."""
    return Subject(shape, dtype, device)


class Wrong(Exception):
    """What a contender gives is beyond the error budget."""


@dataclass
class Prepared:
    """A contender ready to run."""

    run: Callable[[Tensor], Tensor]  # images → logits
    raw: bool = False  # it takes bytes


def prepare(contender: Contender, subject: Subject) -> Prepared:
    """The contender for inference, its logits looked at; `Missing` where it can't take part, `Wrong` beyond the budget."""
    with torch.no_grad():
        ready = _prepare(contender, subject)
        if broken := subject.check(ready.run, ready.raw, contender.ours):
            raise Wrong(broken)
    return ready


def _prepare(contender: Contender, subject: Subject) -> Prepared:
    c, s = contender, subject
    if c.source in (FROZEN, FROZEN_ALL):
        everything = c.source == FROZEN_ALL
        options = {"images": "uint8", "mean": 0.5, "std": 0.5} if everything else {}
        fast = freeze(s.model, dtype=DTYPES[s.dtype], class_token_only=everything, check=False, **options)
        return Prepared(lambda images: fast(images)[0], raw=everything)
    if c.source in ("onnxruntime", "openvino"):
        if s.device.type != "cpu":
            raise Missing("it takes part on CPUs")
        return Prepared(getattr(peers, c.source)(s.model, s.images(0, s.shape.batch)))
    net, implementation = _network(c.source, s.model, s.shape)
    run = _run_as(c, net, s)

    def call(images: Tensor) -> Tensor:
        with backends.use(implementation), _pin(c.pinned):
            return run(images)

    return Prepared(call)


def _network(source: str, model: nn.Module, shape: Shape) -> tuple[nn.Module, str]:
    """A module from images to logits, and the implementation of our operations that is in force for it."""
    if source == "original":
        return peers.Original(model), "auto"
    if source == BASE:
        return _First(model), "reference"
    if source.startswith("plain"):
        implementation = source.removeprefix("plain").strip() or "auto"
        reason = backends.backends().get(implementation)
        if reason is not None:
            raise Missing(f"{implementation} can't run: {reason}")
        return _First(model), implementation
    return getattr(peers, source)(model, shape), "auto"


class _First(nn.Module):
    """A model of ours, its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


@contextlib.contextmanager
def _pin(backend: str):
    with sdpa_kernel(PINNED[backend]) if backend else contextlib.nullcontext():
        yield


def _run_as(c: Contender, net: nn.Module, s: Subject) -> Callable[[Tensor], Tensor]:
    if c.mode == "":
        return net
    if c.mode == "graphed":
        if s.device.type != "cuda":
            raise Missing("CUDA graphs are for GPUs")
        return _Graph(net, s.images(0, s.shape.batch))
    if c.mode == "max-autotune":
        if s.device.type != "cuda":
            raise Missing("max-autotune is for GPUs")
        return torch.compile(_own_code(net), mode="max-autotune", dynamic=False)
    # On a GPU in graphs where launches decide, else plain: compile's own graphs copy their inputs.
    mode = "reduce-overhead" if s.device.type == "cuda" and s.shape.batch <= 8 else None
    any_batch = c.mode.endswith("any-batch")
    if any_batch and s.shape.batch == 1:
        raise Missing("torch.compile takes a batch of one for a constant")
    compiled = torch.compile(_own_code(net), mode=mode, dynamic=any_batch)
    if c.mode.startswith("inductor-frozen"):
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True), torch.no_grad():  # in force while it compiles, in the first call
            compiled(s.images(0, s.shape.batch))
    return compiled


def _own_code(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function with a code object of its own: torch.compile keeps what it compiled by code object.

    Two contenders of one class would otherwise run what was compiled for the first.
    """

    def run(images):
        return net(images)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)


class _Graph:
    """A module captured in a CUDA graph; the images are copied into the memory that it reads."""

    def __init__(self, net: nn.Module, images: Tensor):
        self.images = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(2):
                net(self.images)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits = net(self.images)

    def __call__(self, images: Tensor) -> Tensor:
        self.images.copy_(images)
        self.graph.replay()
        return self.logits


# ---- Times ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What is timed of a model, and how many times: a training step takes three forward passes' products and more memory."""

    direction: str
    prefix: str  # of what is said about it
    calls: Callable[[Contender, Subject], tuple[timing.Calls, dict]]  # ready, their results looked at; more to put in the row
    least: int  # rounds
    gpu_ms: float
    gpu_most: int


def measure(
    record: Record, shape: Shape, dtype: str, device: torch.device, contenders: Sequence[Contender], seconds: float = 20.0
) -> None:
    """Rows of inference. On a CPU all of them are prepared first and then timed by turns; on a GPU one after another.

    :param seconds: of rounds, on a CPU.
    """
    _measure(record, shape, dtype, device, contenders, seconds, _Kind("forward", "model", _forward_calls, 5, 500.0, 300))


def measure_training(
    record: Record, shape: Shape, dtype: str, device: torch.device, contenders: Sequence[Contender], seconds: float = 20.0
) -> None:
    """Rows of a training step, timed as `measure` does."""
    kind = _Kind("training step", "training", _training_calls, 4, 700.0, 100)
    _measure(record, shape, dtype, device, contenders, seconds, kind)


def _training_calls(contender: Contender, subject: Subject) -> tuple[timing.Calls, dict]:
    step = prepare_training(contender, subject)
    return [step.take], {} if step.kept_mib is None else {"kept_mib": step.kept_mib}


def _forward_calls(contender: Contender, subject: Subject) -> tuple[timing.Calls, dict]:
    ready = prepare(contender, subject)
    images = subject.bytes[: subject.shape.batch] if ready.raw else subject.images(0, subject.shape.batch)
    # On a GPU a second set, so that the images don't lie in its cache.
    sets = [images, images.clone()] if subject.device.type == "cuda" else [images]
    return [functools.partial(_quietly, ready.run, images) for images in sets], {}


def _measure(record, shape, dtype, device, contenders, seconds, kind: _Kind) -> None:
    torch._dynamo.reset()
    subject = subject_of(shape, dtype, device)
    by_turns: dict[str, Callable] = {}
    known: dict[str, dict] = {}
    for contender in contenders:
        where = f"{kind.prefix} {shape.label} {dtype} {contender.name}"
        if record.seconds_left() < contender.seconds + (seconds if device.type == "cpu" else 0):
            record.skip(f"{where}: out of time")
            continue
        try:
            calls, more = kind.calls(contender, subject)
        except Exception as error:  # noqa: BLE001
            _left_out(record, where, contender, error)
            continue
        if device.type == "cuda" or record.data["environment"].get("smoke"):
            timed = timing.events(calls, device, target_ms=kind.gpu_ms, most=kind.gpu_most)
            _row(record, timed, shape, dtype, kind.direction, contender.name, **_peak(device), **more)
            del calls
            _free(device)
        else:
            record.say(f"{where}: ready, what it gives is within the budget")
            by_turns[contender.name], known[contender.name] = calls[0], more
    if by_turns:
        most = 40 if shape.batch == 1 else 20
        taken = timing.by_turns(by_turns, seconds, least=kind.least, most=most, at_once_ms=0.0, pause_ms=20.0)
        for name, samples in taken.items():
            ratio = timing.speed_up(taken[BASE], samples) | {"against": BASE} if BASE in taken and name != BASE else {}
            _row(record, timing.summary(samples, "turns"), shape, dtype, kind.direction, name, **ratio, **known[name])


def _left_out(record: Record, where: str, contender: Contender, error: Exception) -> None:
    """Compilers and other packages raise anything, and are left out; ours must not, and fails the run."""
    if isinstance(error, Missing):
        record.skip(f"{where}: {error}")
    elif isinstance(error, torch.OutOfMemoryError):
        record.skip(f"{where}: out of memory")
    else:
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        told = f"{where}: {kind}{' '.join(str(error).split())[:200]}"
        eager = contender.mode in ("", "graphed")
        record.fail(told) if contender.ours and (eager or isinstance(error, Wrong)) else record.skip(told)


def _quietly(run: Callable, images: Tensor) -> Tensor:
    with torch.no_grad():
        return run(images)


def _peak(device: torch.device) -> dict[str, float]:
    return {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def _free(device: torch.device) -> None:
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _row(record: Record, timed: timing.Timing, shape: Shape, dtype: str, direction: str, name: str, **more) -> None:
    passes = 3 if direction == "training step" else 1  # backward is two products for every one of forward
    flops = passes * shape.batch * model_flops(shape.tokens, shape.width, shape.layers, shape.hidden, shape.patch, CLASSES)
    peak = ((record.data["ceilings"] or {}).get("products_tflop_s") or {}).get(dtype)
    rate = flops / timed.ms / 1e9
    # A floor of products alone: what moves through memory is small beside them but for single images on GPUs.
    more |= {"floor_ms": flops / peak / 1e9, "of_ceiling": rate / peak} if peak else {}
    record.row(
        timed, group="model", op="model", direction=direction, shape=shape.label, dtype=dtype, contender=name, checked=True,
        images_per_s=1e3 * shape.batch / timed.ms, tflop_s=rate, **more,
    )  # fmt: skip


# ---- Training step --------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A training step ready to be taken."""

    take: Callable[[], None]
    kept_mib: float | None  # what its forward pass keeps for the backward pass; None where that can't be seen


def prepare_training(contender: Contender, subject: Subject) -> Step:
    """A training step of the contender: forward, cross-entropy, backward, AdamW. Without dropout, in the dtype throughout.

    Looked at before: the loss, and its gradient by the images, which passes through every layer. `Missing` where it can't take
    part, `Wrong` where that is beyond the budget.
    """
    c, s = contender, subject
    model = copy.deepcopy(s.model).train()  # training changes weights: each its own
    net, implementation = _network(c.source, model, s.shape)
    net.train()
    run = _run_as(c, net, s)
    images = s.images(0, s.shape.batch)
    with backends.use(implementation), _pin(c.pinned):
        found = _gradient_of(run, images, s.labels)
    for name, a, o, x in zip(("loss", "gradient by the images"), found, *s.checked_training(), strict=True):
        e = error(a, o, x, DTYPES[s.dtype])  # the loss is a float32 of logits that are not
        if broken := _told(name, e, c.ours):
            raise Wrong(broken)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=s.device.type == "cuda")

    def loss() -> Tensor:
        with backends.use(implementation), _pin(c.pinned):
            return F.cross_entropy(run(images).float(), s.labels)

    def step() -> None:
        with backends.use(implementation), _pin(c.pinned):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    visible = s.device.type == "cuda" or c.mode == ""  # on a CPU a compiled model's memory is the compiler's own affair
    return Step(step, kept_bytes(loss, net.parameters(), s.device) / 2**20 if visible else None)


def _gradient_of(run, images: Tensor, labels: Tensor) -> list[Tensor]:
    images = images.detach().requires_grad_()
    logits = run(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    gradient = torch.autograd.grad(loss, images)[0]
    return [loss.detach(), gradient]


def _loss_and_gradient(subject: Subject, wide: bool) -> list[Tensor]:
    model = copy.deepcopy(subject.model)
    images = subject.images(0, subject.shape.batch)
    if wide:
        model, images = model.double(), images.double()
    with backends.use("reference"):
        return _gradient_of(lambda x: model(x)[0], images, subject.labels)
