"""The calls that matter: every operation with its variants, at the shapes that the published models give it.

One list for the compile report (`meta` tensors), for timing and for tuning, so that what is compiled is what is timed. A case
builds the arguments that the operation's implementations take, in the order of its table in `vit_fast.backends.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vit_fast.benchmarks import roofline
from vit_fast.benchmarks.roofline import Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MODELS = {"Ti": "ViT-Ti_16", "S": "ViT-S_16", "B": "ViT-B_16", "L": "ViT-L_16", "H": "ViT-H_14", "g": "ViT-g_14"}
IMAGES = (224, 384, 512)
OPS = ("attention", "linear", "mlp", "layer_norm", "patch_embed")


@dataclass(frozen=True)
class Shape:
    """A model on square images, a batch of them."""

    model: str  # a short name in MODELS
    image: int  # pixels a side
    batch: int
    patch: int
    width: int  # D
    hidden: int  # of the MLP
    heads: int
    layers: int

    @property
    def tokens(self) -> int:
        return 1 + (self.image // self.patch) ** 2

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def label(self) -> str:
        return f"{self.model}/{self.patch}@{self.image} b{self.batch}"


def shape_of(model: str, image: int = 224, batch: int = 128) -> Shape:
    """The shape of a model by its short name (Ti, S, B, L, H, g), from `vit_fast.configs`."""
    from vit_fast.configs import CONFIGS

    config = CONFIGS[MODELS[model]]
    transformer = config.transformer
    sizes = (config.patches["size"][0], config.hidden_size, transformer["mlp_dim"])
    return Shape(model, image, batch, *sizes, transformer["num_heads"], transformer["num_layers"])


class Maker:
    """Makes tensors of one device and dtype: random ones, reproducible by seed; on `meta` only their shapes."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = torch.device(device), dtype
        self._generator = None
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *sizes: int, scale: float = 1.0, grad: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._generator is None:
            values = torch.empty(sizes, device=self.device)
        else:
            values = torch.randn(sizes, device=self.device, generator=self._generator).mul_(scale)
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def bytes(self, *sizes: int) -> torch.Tensor:
        if self._generator is None:
            return torch.empty(sizes, device=self.device, dtype=torch.uint8)
        return torch.randint(0, 256, sizes, device=self.device, dtype=torch.uint8, generator=self._generator)


@dataclass(frozen=True)
class Case:
    """One operation, one variant, one shape."""

    op: str
    variant: str
    shape: Shape
    hot: bool  # on the path of plain inference or training: spills are not accepted
    arguments: Callable[[Maker], tuple]  # in the order of the operation's implementations
    work: Callable[[str, int], Work]  # (direction of roofline.DIRECTIONS, bytes an element)

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()


def _layer_norm(s: Shape) -> list[Case]:
    def case(variant, residual):
        def arguments(make):
            x = (s.batch, s.tokens, s.width)
            return make(*x), make(s.width), make(s.width), 1e-6, make(*x) if residual else None

        def work(direction, itemsize):
            return roofline.layer_norm(direction, s.rows, s.width, itemsize, residual)

        return Case("layer_norm", variant, s, True, arguments, work)

    return [case("", False), case("+residual", True)]


def _attention(s: Shape) -> list[Case]:
    head_size = s.width // s.heads
    entries = {"none": 0, "all": s.heads * s.tokens**2, "class_token": s.heads * s.tokens, "head_mean": s.tokens**2}

    def case(variant, dropout_p, probs, hot):
        def arguments(make):
            return make(s.batch, s.tokens, 3, s.heads, head_size), dropout_p, probs

        def work(direction, itemsize):
            return roofline.attention(direction, s.batch, s.tokens, s.heads, head_size, itemsize, entries[probs])

        return Case("attention", variant, s, hot, arguments, work)

    return [
        case("", 0.0, "none", True),
        case("dropout", 0.1, "none", False),
        case("probs=all", 0.0, "all", False),
        case("probs=class_token", 0.0, "class_token", False),
        case("probs=head_mean", 0.0, "head_mean", False),
    ]


def _linear(s: Shape) -> list[Case]:
    def case(variant, inputs, outputs, activation=None, residual=False, hot=True, dropped=()):
        def arguments(make):
            x, r = make(s.batch, s.tokens, inputs), make(s.batch, s.tokens, outputs) if residual else None
            return x, make(outputs, inputs, scale=inputs**-0.5), make(outputs), activation, r, *dropped

        def work(direction, itemsize):
            return roofline.linear(direction, s.rows, inputs, outputs, itemsize, residual, activation is not None)

        return Case("linear", variant, s, hot, arguments, work)

    return [
        case("qkv", s.width, 3 * s.width),
        case("out+residual", s.width, s.width, residual=True),
        case("fc1", s.width, s.hidden, hot=False),  # beside fc1+gelu: what an epilogue costs
        case("fc1+gelu", s.width, s.hidden, activation="gelu"),
        case("fc1+gelu_tanh", s.width, s.hidden, activation="gelu_tanh", hot=False),
        case("fc2+residual", s.hidden, s.width, residual=True),
        case("out+dropout+residual", s.width, s.width, residual=True, hot=False, dropped=(0.1, 0.1)),
    ]


def _mlp(s: Shape) -> list[Case]:
    def case(variant, hot=True, dropped=()):
        def arguments(make):
            x = (s.batch, s.tokens, s.width)
            first = make(s.hidden, s.width, scale=s.width**-0.5), make(s.hidden)
            second = make(s.width, s.hidden, scale=s.hidden**-0.5), make(s.width)
            return make(*x), *first, *second, "gelu", make(*x), *dropped

        def work(direction, itemsize):
            return roofline.mlp(direction, s.rows, s.width, s.hidden, itemsize, residual=True)

        return Case("mlp", variant, s, hot, arguments, work)

    return [case("+residual"), case("+dropout+residual", hot=False, dropped=(0.1, 0.1))]


def _patch_embed(s: Shape) -> list[Case]:
    def case(variant, hot=True, uint8=False, channels_last=False, image_gradient=False):
        def arguments(make):
            size = (s.batch, 3, s.image, s.image)
            images = make.bytes(*size) if uint8 else make(*size, grad=image_gradient)
            if channels_last:
                images = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_(image_gradient)
            inputs = 3 * s.patch**2
            weight = make(s.width, 3, s.patch, s.patch, scale=inputs**-0.5)
            mean = std = None
            if uint8:
                mean, std = (torch.full((3,), v, device=make.device) for v in (0.45, 0.22))
            return images, weight, make(s.width), make(1, 1, s.width), make(1, s.tokens, s.width), mean, std

        def work(direction, itemsize):
            image_itemsize = 1 if uint8 else itemsize
            sizes = (s.batch, 3, s.image, s.image, s.patch, s.width)
            return roofline.patch_embed(direction, *sizes, itemsize, image_itemsize, image_gradient)

        return Case("patch_embed", variant, s, hot, arguments, work)

    return [
        case(""),
        case("uint8", uint8=True),
        case("channels_last", channels_last=True),
        case("uint8 channels_last", uint8=True, channels_last=True),
        case("images' gradient", hot=False, image_gradient=True),
    ]


_BY_OP = {"attention": _attention, "linear": _linear, "mlp": _mlp, "layer_norm": _layer_norm, "patch_embed": _patch_embed}


def cases_of(op: str, shape: Shape) -> list[Case]:
    """The cases of an operation at a shape, the plain one first."""
    return _BY_OP[op](shape)


def find(op: str, variant: str, shape: Shape) -> Case:
    """The case with that variant; ValueError names those there are."""
    cases = cases_of(op, shape)
    for case in cases:
        if case.variant == variant:
            return case
    raise ValueError(f"{op} has no case {variant!r}: choose one of {[case.variant for case in cases]}")
