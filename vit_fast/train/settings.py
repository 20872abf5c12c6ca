"""What a training run is told: plain values, so that they can be kept in a checkpoint and compared when it is resumed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch

from vit_fast.backends import NAMES
from vit_fast.configs import CONFIGS, Config
from vit_fast.terminal import CommandError
from vit_fast.train.augment import Augmentation

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
AMP = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Settings:
    """A training run. ``batch`` counts the images of a step, whatever number of processes and passes share them."""

    data: str = ""  # see `vit_fast.train.data`; "" where Data are passed instead
    output: str = ""  # the run's folder
    # the model
    model: str | None = None  # an entry of CONFIGS (default: what the weights' shapes tell, or ViT-Ti_16); the following
    # replace its fields where they are given
    patch: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    mlp_dim: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    stochastic_depth: float = 0.0
    weights: str | None = None  # a file to start from
    img_size: tuple[int, int] | None = None  # None: the weights', else the data's, else 224
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    # how long, how fast
    epochs: float = 10.0
    steps: int | None = None  # instead of epochs
    batch: int = 128
    accumulate: int = 1  # passes that share a step's images
    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9  # of sgd
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.1  # part of the steps
    clip: float = 1.0  # the gradients' greatest norm; 0: unlimited
    label_smoothing: float = 0.0
    ema: float = 0.0  # decay of the weights' running mean, which is what is judged and kept then; 0: none
    # what happens to the images
    crop: float = 1.0
    flip: bool = False
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    mixup: float = 0.0
    hold_out: float = 0.2
    # how it is computed
    amp: str = "off"
    gradient_checkpointing: bool = False
    compile: bool = False
    implementation: str | None = None  # None: what is selected when training begins
    parallel: str = "ddp"  # where torchrun has started several processes
    device: str | None = None
    workers: int = 4  # threads that decode pictures
    seed: int = 0
    # what is written
    evaluate_every: int | None = None  # steps; None: an epoch's
    checkpoint_every: int | None = None  # steps; None: as often as it is evaluated
    log_every: int = 10
    keep: int = 3
    tensorboard: bool | None = None  # None: if it is installed

    def __post_init__(self):
        _check(self)

    def augmentation(self) -> Augmentation:
        return Augmentation(*(getattr(self, field.name) for field in dataclasses.fields(Augmentation)))

    def config(self, found: Config):
        """The model's configuration: what was found, with the fields that are given here."""
        config = copy.deepcopy(found)
        t = config.transformer
        if self.patch is not None:
            if config.patches.get("grid"):
                raise CommandError("--patch: the hybrid takes its patches from a ResNet")
            config.patches["size"] = (self.patch, self.patch)
        config.hidden_size = self.hidden_size or config.hidden_size
        t.num_layers, t.num_heads = self.layers or t.num_layers, self.heads or t.num_heads
        t.mlp_dim = self.mlp_dim or t.mlp_dim
        if config.hidden_size % t.num_heads:
            raise CommandError(f"a width of {config.hidden_size} can't be divided among {t.num_heads} heads")
        t.dropout_rate = t.dropout_rate if self.dropout is None else self.dropout
        if self.attention_dropout is not None:
            t.attention_dropout_rate = self.attention_dropout
        if self.stochastic_depth:
            t.stochastic_depth_rate = self.stochastic_depth
        return config

    def differences(self, kept: dict) -> list[str]:
        """What of another run's settings would have led elsewhere than these."""
        ours = self.as_dict()
        return [f"{k}: {kept[k]!r} then, {ours[k]!r} now" for k in ours if k not in _FREE and k in kept and kept[k] != ours[k]]

    def as_arguments(self) -> list[str]:
        """The arguments of ``vit-fast train`` that ask for this run."""
        words = [self.data or "DATA"]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("data", "tensorboard") or value == f.default:
                continue
            words.append("--" + f.name.replace("_", "-"))
            if f.name == "img_size":
                words.append("x".join(map(str, value)))
            elif not isinstance(value, bool):
                values = value if isinstance(value, tuple) else (value,)
                words.append(",".join(str(v).removesuffix(".0") for v in values))
        return words

    def as_dict(self) -> dict:
        """Only lists, numbers and text: what JSON holds."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


# A run may be resumed with others of these: in another folder, by more processes, with a log that is written more often.
_FREE = {"data", "output", "device", "parallel", "workers", "implementation", "compile", "gradient_checkpointing"} | {
    "evaluate_every",
    "checkpoint_every",
    "log_every",
    "keep",
    "tensorboard",
    "accumulate",
}


def _check(s: Settings) -> None:
    def need(ok: bool, text: str) -> None:
        if not ok:
            raise CommandError(text)

    need(s.model is None or s.model in CONFIGS, f"there is no model {s.model!r}; there are {', '.join(CONFIGS)}")
    for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("amp", tuple(AMP)), ("parallel", PARALLEL)):
        value = getattr(s, name)
        need(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    for name in ("batch", "accumulate", "log_every", "keep", "workers"):
        need(getattr(s, name) >= 1, f"{name} must be a whole number from 1 on, got {getattr(s, name)}")
    for name in ("steps", "evaluate_every", "checkpoint_every", "patch", "hidden_size", "layers", "heads", "mlp_dim"):
        need(getattr(s, name) is None or getattr(s, name) >= 1, f"{name} must be a whole number from 1 on")
    for name in ("lr", "epochs"):
        need(0 < getattr(s, name) < float("inf"), f"{name} must be above 0, got {getattr(s, name)}")
    for name in ("weight_decay", "clip", "rotate", "shear", "shift", "zoom", "mixup"):
        need(0 <= getattr(s, name) < float("inf"), f"{name} must be 0 or above, got {getattr(s, name)}")
    for name in ("momentum", "label_smoothing", "ema"):
        need(0 <= getattr(s, name) < 1, f"{name} must be from 0 to below 1, got {getattr(s, name)}")
    for name in ("warmup", "stochastic_depth", "dropout", "attention_dropout"):
        value = getattr(s, name)
        need(value is None or 0 <= value <= 1, f"{name} must be from 0 to 1, got {value}")
    need(0 < s.crop <= 1, f"crop is a part of the area, above 0 and up to 1, got {s.crop}")
    need(0 < s.hold_out < 1, f"hold_out is a part of the images, between 0 and 1, got {s.hold_out}")
    need(s.implementation in (None, "auto", *NAMES), f"there is no implementation {s.implementation!r}")
    need(s.batch % s.accumulate == 0, f"a batch of {s.batch} can't be shared by {s.accumulate} passes")
