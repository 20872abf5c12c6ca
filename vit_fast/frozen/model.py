"""`freeze` and what it returns."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks

from vit_fast.frozen import families, files
from vit_fast.frozen.description import Architecture, Description, Outputs, Unsupported
from vit_fast.frozen.engine import Engine, computer_for
from vit_fast.frozen.fold import Folded, Normalisation, fold
from vit_fast.frozen.graphs import Graphs
from vit_fast.ops.checks import dtype_name
from vit_fast.testing import Error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Report:
    """What a frozen model is made of; ``print`` it, or read the fields."""

    model: str
    device: str
    dtype: str
    implementations: Mapping[str, str]  # of each operation
    folded: Sequence[str]
    not_computed: Sequence[str]  # what the source computes and this leaves out, outputs being the same
    memory: int  # bytes of weights and buffers at the time of the report
    parity: Mapping[str, Error] = field(default_factory=dict)  # by output; empty if it was not checked

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.dtype}, {self.device}"]
        lines += ["computed by   " + ", ".join(f"{op}: {name}" for op, name in self.implementations.items())]
        lines += [f"folded        {text}" for text in self.folded]
        lines += [f"left out      {text}" for text in self.not_computed]
        lines += [f"memory        {self.memory / 2**20:.1f} MiB of weights and buffers"]
        if not self.parity:
            lines += ["parity        not checked"]
        for name, e in self.parity.items():
            lines += [f"parity        {name}: error {e.value:.2e}, budget {e.budget:.2e} (the formula's own {e.reference:.2e})"]
        return "\n".join(lines)


class Frozen:
    """A snapshot of a trained Vision Transformer, made for inference: call it as its source is called.

    Made by `freeze` or `Frozen.load`. Safe to call from several threads. It computes no gradients.
    """

    def __init__(self, folded: Folded, stem: nn.Module | None, device: torch.device, dtype: torch.dtype, options: Options):
        self.options = options
        self.family: ModuleType = families.by_name(folded.architecture.family)
        self._folded = folded.done
        self._engine = Engine(folded, stem, device, dtype)
        self._parsed: dict[Any, Outputs] = {}
        self._parity: dict[str, Error] = {}
        self._source: Any = lambda: None  # a weak reference to the source model
        self._graphs = Graphs(device) if options.cuda_graphs and device.type == "cuda" else None
        self._lock = threading.Lock()
        if options.outputs is not None:
            self._outputs(options.outputs)

    # ---- What it is -------------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> Architecture:
        return self._engine.architecture

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self._engine.dtype

    @property
    def normalisation(self) -> Normalisation | None:
        """What bytes are normalised by; None if images are floating point."""
        return self.options.normalisation

    def report(self) -> Report:
        """What was folded, what computes each operation, the memory held, and the parity measured."""
        a = self.architecture
        left_out = []
        if self.options.class_token_only and a.pool in ("class_token", "first_two"):
            left_out.append(
                "all but the pooled tokens in the last block, behind its keys and values; unless tokens are asked for"
            )
        return Report(
            model=f"{a.family} {a.name}: {a.depth} blocks of width {a.width}, {a.image_size[0]}x{a.image_size[1]} pixels",
            device=str(self.device),
            dtype=dtype_name(self.dtype),
            implementations=self._engine.computer.implementations(),
            folded=tuple(self._folded),
            not_computed=tuple(left_out),
            memory=self._engine.memory(),
            parity=dict(self._parity),
        )

    def __repr__(self) -> str:
        a = self.architecture
        return f"Frozen({a.family} {a.name}, {dtype_name(self.dtype)}, {self.device})"

    # ---- Calling it -------------------------------------------------------------------------------------------------

    def __call__(self, *args, outputs: str | Iterable[str] | None = None, **kwargs) -> Any:
        """What the source returns for these arguments; with ``outputs`` a dict of the results with these names.

        :param args: as the source takes them; the images first. :param outputs: see `description.Outputs`.
        :raises ValueError, TypeError: images, or names, that don't fit.
        """
        if torch.compiler.is_compiling():
            from vit_fast.frozen import opaque

            return opaque.call(self, *args, outputs=outputs, **kwargs)
        return self.call(*args, outputs=outputs, **kwargs)

    def call(self, *args, outputs: str | Iterable[str] | None = None, **kwargs) -> Any:
        """The same, for no compiler to trace."""
        request = self.family.request(self.architecture, *args, **kwargs)
        wanted = self.options.outputs if outputs is None else outputs
        names = request.outputs if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
        images = self._checked(request.images, self.options.any_size or self.architecture.any_size or request.any_size)
        with torch.no_grad():
            if torch.is_autocast_enabled(self.device.type):
                with torch.autocast(self.device.type, enabled=False):
                    results = self._run(images, names)
            else:
                results = self._run(images, names)
        return request.wrap(results) if wanted is None else results

    def forward(self, *args, **kwargs) -> Any:
        """The same as calling it."""
        return self(*args, **kwargs)

    def _outputs(self, names: str | Iterable[str]) -> Outputs:
        key = names if isinstance(names, str) else tuple(names)
        if key not in self._parsed:
            self._parsed[key] = Outputs.parse(key, self.architecture)
        return self._parsed[key]

    def _run(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        graphs = self._graphs
        if graphs is None or images.shape[0] == 0 or torch.cuda.is_current_stream_capturing():
            return self._compute(self._cast(images), names)
        dtype = torch.uint8 if self.normalisation else self.dtype
        return graphs(names, images, dtype, lambda static: self._compute(static, names))

    def _compute(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        return self._engine.run(images, self._outputs(names), self.options.class_token_only)

    def _cast(self, images: Tensor) -> Tensor:
        return images if self.normalisation else images.to(self.dtype)

    def _checked(self, images: Tensor, any_size: bool) -> Tensor:
        """The images as [B, C, H, W], after all that can be wrong with them was looked for."""
        a = self.architecture
        if not isinstance(images, Tensor):
            raise TypeError(f"frozen {a.name}: images must be a tensor, got {type(images).__name__}")
        if images.dim() != 4:
            raise ValueError(f"frozen {a.name}: images must be [B, C, H, W], got {list(images.shape)}")
        if self.normalisation is not None:
            if images.dtype != torch.uint8:
                raise TypeError(f"frozen {a.name}: it was frozen for uint8 images, got {dtype_name(images.dtype)}")
            if images.shape[1] != a.channels and images.shape[3] == a.channels:
                images = images.permute(0, 3, 1, 2)
        elif not images.is_floating_point():
            raise TypeError(
                f"frozen {a.name}: images must be floating point, got {dtype_name(images.dtype)};"
                " freeze(model, images='uint8', mean=…, std=…) takes bytes"
            )
        if images.shape[1] != a.channels:
            raise ValueError(f"frozen {a.name}: images must have {a.channels} channels, got {list(images.shape)}")
        if images.device != self.device:
            raise ValueError(f"frozen {a.name}: images must be on {self.device}, got {images.device}")
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"frozen {a.name}: it computes no gradients, and the images require one: use the source model")
        size = (images.shape[2], images.shape[3])
        if size != a.image_size:
            if not any_size:
                raise ValueError(
                    f"frozen {a.name}: images are {size[0]}x{size[1]}, the model is for {a.image_size[0]}x{a.image_size[1]}:"
                    " resize them, or freeze(model, interpolate_positions=True)"
                )
            if a.stem_size is None and 0 in a.grid_for(*size):
                raise ValueError(f"frozen {a.name}: images of {size[0]}x{size[1]} are smaller than one patch")
        return images

    # ---- Before and after -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def warmup(
        self,
        batch_sizes: Iterable[int] = (1,),
        image_size: tuple[int, int] | None = None,
        outputs: str | Iterable[str] | None = None,
    ) -> None:
        """Do ahead what the first call of each batch size does: allocate, compile kernels, capture a CUDA graph.

        :param image_size: pixels, the model's own unless given. :param outputs: as in the call; those of a plain call if None.
        """
        for batch in batch_sizes:
            self(self._example(batch, image_size), outputs=outputs)

    @torch.no_grad()
    def input_buffer(
        self, batch: int, image_size: tuple[int, int] | None = None, outputs: str | Iterable[str] | None = None
    ) -> Tensor:
        """On a GPU with graphs the memory [batch, C, H, W] that the graph reads: a call with it, filled, copies nothing.

        It is overwritten by every call with other images of that batch size. RuntimeError where there are no graphs.
        """
        if self._graphs is None:
            raise RuntimeError(f"frozen {self.architecture.name}: there are no CUDA graphs here, so no buffer that they read")
        example = self._example(batch, image_size)
        request = self.family.request(self.architecture, example)
        wanted = self.options.outputs if outputs is None else outputs
        names = request.outputs if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
        return self._graphs.input(names, example, example.dtype, lambda static: self._compute(static, names))

    def _example(self, batch: int, image_size: tuple[int, int] | None) -> Tensor:
        a = self.architecture
        dtype = torch.uint8 if self.normalisation else self.dtype
        return torch.zeros((batch, a.channels, *(image_size or a.image_size)), dtype=dtype, device=self.device)

    def refresh(self, model: nn.Module | None = None) -> None:
        """Read the weights again, in place: from the source, or from a model of the same architecture.

        Calls that run meanwhile may see some weights old and some new. RuntimeError if the source no longer exists; ValueError
        for another architecture.
        """
        model = self._source() if model is None else model
        if model is None:
            raise RuntimeError(f"frozen {self.architecture.name}: its source no longer exists: refresh(model)")
        _refuse_state(model)
        description = families.family_of(model).describe(model)
        if description.architecture != self.architecture:
            raise ValueError(f"frozen {self.architecture.name}: the model is of another architecture: freeze it anew")
        with self._lock:
            self._engine.update(self._fold(description), description.stem)
        self._parity = {}

    def _fold(self, description: Description) -> Folded:
        return folded_for(description, self.device, self.dtype, self.normalisation)

    # ---- Files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write it to one safetensors file, with its description as JSON in the header; `Frozen.load` reads it."""
        files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu", **options) -> Frozen:
        """The frozen model in a file by `save`: the same outputs, with no need for the source or its package.

        :param device: where it is to run. :param options: ``outputs``, ``class_token_only``, ``cuda_graphs``,
            ``interpolate_positions`` of `freeze`, where they are to differ from what was saved.
        :raises ValueError: a file that is damaged, or isn't one of these.
        """
        return files.load(path, torch.device(device), **options)

    # ---- What it is not ---------------------------------------------------------------------------------------------

    def eval(self) -> Frozen:
        return self

    def train(self, mode: bool = True) -> Frozen:
        """RuntimeError: it can't be trained."""
        if mode:
            raise RuntimeError(
                f"frozen {self.architecture.name}: a snapshot can't be trained: train the source, then refresh()"
            )
        return self


@dataclass(frozen=True)
class Options:
    """What `freeze` was asked for."""

    normalisation: Normalisation | None = None
    outputs: str | tuple[str, ...] | None = None
    class_token_only: bool = True
    cuda_graphs: bool = True
    any_size: bool = False


def folded_for(
    description: Description, device: torch.device, dtype: torch.dtype, normalisation: Normalisation | None
) -> Folded:
    """The weights folded for what computes there, and on that device."""
    folded = fold(description, dtype, normalisation, computer_for(device, dtype).unit)
    folded.weights = {name: tensor.to(device) for name, tensor in folded.weights.items()}
    return folded


def freeze(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    images: str = "float",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    outputs: str | Iterable[str] | None = None,
    class_token_only: bool = True,
    interpolate_positions: bool = False,
    cuda_graphs: bool = True,
    check: bool = True,
) -> Frozen:
    """A trained Vision Transformer as a callable that gives the same outputs, as fast as this machine allows.

    The model may be one of ours, timm's `VisionTransformer`, a ViT, DeiT, Dinov2, CLIP or SigLIP vision model of transformers,
    or torchvision's `VisionTransformer`. It is left as it is; later changes to it don't reach the result, until
    ``result.refresh()``.

    :param model: in eval mode, without hooks.
    :param dtype: what is computed in, and returned: float32, bfloat16 or float16.
    :param device: where; the model's own unless given.
    :param images: ``"float"`` for what the model takes, ``"uint8"`` for bytes [B, C, H, W] or [B, H, W, C], of which then
        (byte / 255 - mean) / std is computed inside the patch embedding, for free.
    :param mean, std: for bytes: one number, or one a channel; needed with ``images="uint8"``.
    :param outputs: names of results to return as a dict, in place of what the source returns: ``logits``, ``pooled``,
        ``tokens``, ``embeddings``, ``layer:i``, ``attention:i``, ``attention_class_token:i``, ``attention_mean:i`` (see
        `vit_fast.frozen.description.Outputs`). Each call can ask for others.
    :param class_token_only: the last block computes only what the head reads, wherever nothing else is asked for.
    :param interpolate_positions: take images of other sizes too, with the position table resized by the family's rule.
    :param cuda_graphs: on a GPU, replay a captured graph for each batch size.
    :param check: compare it with the source on random images, see `Frozen.report`. It takes the source in float64 for a moment.
    :raises Unsupported (a ValueError): a model that can't be frozen; the message names what is in the way.
    :raises RuntimeError: ``check`` found an output beyond the error budget.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise TypeError(f"freeze: dtype must be one of {', '.join(map(dtype_name, DTYPES))}, got {dtype!r}")
    family = families.family_of(model)
    _refuse_state(model)
    description = family.describe(model)
    normalisation = _normalisation(images, mean, std, description)
    if interpolate_positions and description.architecture.resize is None and "positions" in description.weights:
        raise ValueError(f"freeze: there is no rule by which {description.architecture.name} resizes its position table")
    if outputs is not None and not isinstance(outputs, str):
        outputs = tuple(outputs)
    of = next(iter(description.weights.values())).device
    device = of if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    options = Options(normalisation, outputs, class_token_only, cuda_graphs, interpolate_positions)
    stem = None if description.stem is None else copy.deepcopy(description.stem).to(device, dtype)
    frozen = Frozen(folded_for(description, device, dtype, normalisation), stem, device, dtype, options)
    frozen._source = weakref.ref(model)
    if check:
        _check(frozen, model, description)
    _give_back_memory()
    return frozen


def _give_back_memory() -> None:
    """Return what folding and packing freed to the system; glibc keeps it otherwise: 290 of B/16's 1010 MB, float32."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _check(frozen: Frozen, model: nn.Module, description: Description) -> None:
    from vit_fast.frozen.check import MORE_IMAGES, parity

    frozen._parity = parity(frozen, model, description)
    if not all(e.ok for e in frozen._parity.values()):
        frozen._parity = parity(frozen, model, description, MORE_IMAGES)
    over = {name: e for name, e in frozen._parity.items() if not e.ok}
    if over:
        found = ", ".join(f"{name}: error {e.value:.2e}, budget {e.budget:.2e}" for name, e in over.items())
        raise RuntimeError(
            f"freeze: {frozen.architecture.name} in {dtype_name(frozen.dtype)} is beyond the error budget ({found});"
            " check=False takes it as it is"
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _refuse_state(model: nn.Module) -> None:
    """`Unsupported` for what a snapshot can't honour: training mode, hooks, weights that aren't there."""
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        raise Unsupported("freeze: hooks are registered on all modules, and a frozen model would never call them")
    is_own_hook = getattr(families.family_of(model), "is_own_hook", None)  # of those that the family's package leaves there
    for name, module in model.named_modules():
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        if module.training:
            raise Unsupported(f"freeze: {where} is in training mode: call model.eval() first")
        hooks = [h for kind in _HOOKS for h in getattr(module, kind).values() if not (is_own_hook and is_own_hook(h))]
        if hooks:
            raise Unsupported(f"freeze: {where} has hooks, and a frozen model would never call them: remove them first")
    parameters = list(model.parameters())
    if any(p.device.type == "meta" for p in parameters):
        raise Unsupported(f"freeze: {type(model).__name__} has parameters on the meta device: load its weights first")
    if len({p.device for p in parameters}) > 1:
        raise Unsupported(f"freeze: {type(model).__name__} lies on several devices: move it to one")


def _normalisation(images: str, mean: Any, std: Any, description: Description) -> Normalisation | None:
    if images not in ("float", "uint8"):
        raise ValueError(f"freeze: images must be 'float' or 'uint8', got {images!r}")
    if images == "float":
        if mean is not None or std is not None:
            raise ValueError("freeze: mean and std are for images='uint8'; floating-point images come normalised")
        return None
    if mean is None or std is None:
        raise ValueError("freeze: images='uint8' needs mean and std, of the training images' channels in 0…1")
    if description.stem is not None:
        raise Unsupported("freeze: a hybrid's backbone pads the normalised images with zeros, so it takes no bytes")
    channels = description.architecture.channels
    values = []
    for name, given in (("mean", mean), ("std", std)):
        given = torch.as_tensor(given, dtype=torch.float64).flatten().tolist()
        given = given * channels if len(given) == 1 else given
        if len(given) != channels or any(v != v or abs(v) == float("inf") for v in given):
            raise ValueError(f"freeze: {name} must be one number, or one for each of {channels} channels, got {given}")
        values.append(tuple(given))
    if min(values[1]) <= 0:
        raise ValueError(f"freeze: std must be above 0, got {values[1]}")
    return Normalisation(*values)
