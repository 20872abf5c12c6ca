"""What the user names on the command line, as what the commands compute with: weights, models, devices, pictures.

Whatever is wrong with it becomes a `CommandError` that says what was wrong and what would work.
"""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_fast import checkpoints
from vit_fast.configs import CONFIGS, name_of, sized
from vit_fast.modeling import VisionTransformer
from vit_fast.terminal import CommandError, needs, note, one_line, progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEED = 0  # of random weights and images
_SAVED_AS = (".png", ".jpg", ".jpeg", ".webp")


# ---- Devices --------------------------------------------------------------------------------------------------------


def devices() -> list[str]:
    """The devices that models can run on here."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def device_for(name: str | None) -> torch.device:
    """The named device, checked; unless one is named the first CUDA device, else the CPU."""
    here = devices()
    if name is None:
        return torch.device("cuda:0" if "cuda:0" in here else "cpu")
    if name != "cuda" and name not in here or name == "cuda" and "cuda:0" not in here:
        raise CommandError(f"--device {name}: there is no such device here; there is {', '.join(here)}")
    return torch.device(name)


# ---- Models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and what to call it."""

    model: VisionTransformer
    name: str  # of its entry in CONFIGS
    weights: str  # where they come from, for people

    @property
    def size(self) -> tuple[int, int]:
        return self.model.transformer.embeddings.img_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.model.transformer.embeddings.grid

    @property
    def layers(self) -> int:
        return len(self.model.transformer.encoder.layer)

    @property
    def heads(self) -> int:
        return self.model.transformer.encoder.layer[0].attn.num_attention_heads

    def show_attention(self, vis: bool) -> None:
        """Whether the model also returns its attention weights."""
        self.model.transformer.encoder.vis = vis
        for block in self.model.transformer.encoder.layer:
            block.attn.vis = vis

    def __str__(self) -> str:
        return f"{self.name}, {self.size[0]}x{self.size[1]} pixels, {self.weights}"


def load(
    name: str | None, weights: str | None, img_size: tuple[int, int] | None, *, device="cpu", dtype="float32", need_head=False
) -> Loaded:
    """The model that the options ask for, with the file's weights, or random ones if there is no file.

    What is not given is read off the file: the name from the shapes of its tensors, the image size from its position table,
    the number of classes from its head. Without a file: ViT-B_16, 224 pixels, 1000 classes.
    """
    device = device_for(device)
    name = name or (None if weights else "ViT-B_16")
    found = recognise(weights, name) if weights is not None else Recognised(name, CONFIGS[name], None, None)
    if need_head and found.classes is None:
        raise CommandError(f"{weights} has no head, so it knows no classes: use a file with head.weight and head.bias")
    name, img_size = found.name, img_size or found.size or (224, 224)
    with progress(f"building {name}"):
        model = random_model(found, img_size, found.classes or 1000)
        if weights is not None:
            load_into(model, weights, "strict" if found.classes else "drop")
        # Gradients are never asked for. Half precision is for the weights too: that is what the kernels are made for.
        model = model.eval().requires_grad_(False).to(device=device, dtype=DTYPES[dtype])
    return Loaded(model, name, f"weights of {weights}" if weights else f"random weights (seed {SEED})")


@dataclass(frozen=True)
class Recognised:
    """What is to be built: by what name, of what sizes, and as far as a file of weights tells, for what images and classes."""

    name: str  # of its entry in CONFIGS, or a description
    config: Mapping
    size: tuple[int, int] | None  # height and width of the images
    classes: int | None  # None without a head


def random_model(found: Recognised, size: tuple[int, int], num_classes: int, seed: int = SEED) -> VisionTransformer:
    """The model with random weights, on the CPU. CommandError for an image size that its patches don't divide."""
    name, config = found.name, found.config
    patch = 16 if config.patches.get("grid") else config.patches["size"][0]  # the hybrid's backbone divides by 16
    for pixels in size:
        if pixels % patch or pixels < patch:
            near = sorted({max(1, pixels // patch) * patch, (pixels // patch + 1) * patch})
            raise CommandError(
                f"--img-size {pixels}: the image size of {name} is a multiple of its patches' {patch} pixels:"
                f" try {' or '.join(map(str, near))}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = VisionTransformer(config, img_size=size, num_classes=num_classes)
        except ValueError as error:
            raise CommandError(f"--img-size {size[0]}x{size[1]}: {one_line(error)}") from None
        # They start as zeros, with which a position or a class token that goes astray would change nothing.
        with torch.no_grad():
            model.transformer.embeddings.position_embeddings.normal_(std=0.02)
            model.transformer.embeddings.cls_token.normal_(std=0.02)
    return model


def load_into(model: VisionTransformer, path: str, head: str) -> None:
    """`vit_fast.checkpoints.load`, with whatever it says as a line for users."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            checkpoints.load(model, path, head=head)
        except (checkpoints.CheckpointError, OSError) as error:
            raise CommandError(one_line(error)) from None
    for remark in remarks:
        note(one_line(str(remark.message)))


def recognise(path: str, name: str | None = None) -> Recognised:
    """What the tensors in a file tell; a model that is not in CONFIGS is known by what `vit_fast.checkpoints.save` noted."""
    try:
        with progress(f"reading {Path(path).name}"):
            if path.endswith(".npz"):
                state: Mapping = checkpoints.from_google(checkpoints.load_npz(path))
            else:
                state = checkpoints.read_state_dict(path)
    except (checkpoints.CheckpointError, OSError, ImportError) as error:
        raise CommandError(one_line(error)) from None
    embeddings = "transformer.embeddings."
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    kernel, table = shapes.get(embeddings + "patch_embeddings.weight", ()), shapes.get(embeddings + "position_embeddings", ())
    fc1 = shapes.get("transformer.encoder.layer.0.ffn.fc1.weight", ())
    if (len(kernel), len(table), len(fc1)) != (4, 3, 2):
        raise CommandError(
            f"{path} holds no Vision Transformer: it needs Google's names (embedding/kernel, …) or those of vit_fast"
            " (transformer.embeddings.…); files of timm, Hugging Face and torchvision have other names"
        )
    layers = len({key.split(".")[3] for key in shapes if key.startswith("transformer.encoder.layer.")})
    hybrid = any(key.startswith(embeddings + "hybrid_model.") for key in shapes)
    patch = (16, 16) if hybrid else kernel[2:]
    metadata = _metadata(path)
    match = re.fullmatch(r"(\d+)x(\d+)", metadata.get("image_size", ""))
    size = (int(match[1]), int(match[2])) if match else _square(table[1] - 1, patch)
    head = shapes.get("head.weight", ())
    classes = head[0] if len(head) == 2 else None
    heads = metadata.get("num_heads", "")
    heads = int(heads) if heads.isdecimal() and int(heads) and fc1[1] % int(heads) == 0 else None
    name = name or name_of(fc1[1], fc1[0], layers, None if hybrid else patch, heads)
    if name is None and heads and not hybrid:
        config = sized(patch, fc1[1], fc1[0], heads, layers)
        return Recognised(f"ViT of {layers} layers, {fc1[1]} channels", config, size, classes)
    if name is None:
        raise CommandError(
            f"{path}: no model here has {layers} layers, {fc1[1]} channels, {fc1[0]} in the MLP and"
            f" patches of {patch[0]}x{patch[1]}; there are {', '.join(CONFIGS)}"
        )
    return Recognised(name, CONFIGS[name], size, classes)


def _metadata(path: str) -> dict[str, str]:
    if not path.endswith(".safetensors"):
        return {}
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _square(patches: int, patch: tuple[int, int]) -> tuple[int, int] | None:
    """The image size of a square grid of that many patches."""
    side = math.isqrt(max(patches, 0))
    return (side * patch[0], side * patch[1]) if side * side == patches and side else None


# ---- Pictures -------------------------------------------------------------------------------------------------------


def read_picture(path: str | os.PathLike):
    """The picture in a file, as people see it: turned upright as its EXIF data ask, in RGB with 8 bits, on white where it is
    transparent. Of an animation the first frame. A damaged or cut off file is refused.
    """
    Image, ImageOps = needs("reading a picture", "PIL.Image"), needs("reading a picture", "PIL.ImageOps")
    if not os.path.exists(path):
        raise CommandError(f"no such picture: {path}")
    if os.path.isdir(path):
        raise CommandError(f"{path} is a folder: name the pictures in it, such as {os.path.join(path, '*.jpg')}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large; twice as much is an error
            with Image.open(path) as file:
                file.load()
                picture = ImageOps.exif_transpose(file)
    except Image.UnidentifiedImageError:
        raise CommandError(f"{path} is no picture that Pillow can read (JPEG, PNG, WebP, TIFF, … work)") from None
    except Image.DecompressionBombError as error:
        raise CommandError(f"{path} is too large: {one_line(error)}") from None
    except PermissionError:
        raise CommandError(f"{path} can't be read: permission denied") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise CommandError(f"{path} is damaged: {one_line(error)}") from None
    return _rgb(picture, path)


def _rgb(picture, path):
    import numpy as np
    from PIL import Image

    if picture.mode == "F":
        raise CommandError(f"{path} has floating-point pixels, whose black and white are not known: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        gray = np.asarray(picture).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise CommandError(f"{path} has pixels of more than 16 bits: save it with 8 or 16")
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def as_images(
    pictures: Sequence, size: tuple[int, int], mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> Tensor:
    """The pictures as [B, 3, *size], float32: resized (bicubic, sides not kept in proportion), then (x / 255 - mean) / std."""
    import numpy as np
    from PIL import Image

    resized = [np.array(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)) for picture in pictures]
    images = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def checked_output(path: str) -> Path:
    """The path, if a picture can be written there; asked before anything long is computed."""
    output = Path(path)
    if output.is_dir():
        raise CommandError(f"{path} is a folder: name a file in it, such as {output / 'attention.png'}")
    if output.suffix.lower() not in _SAVED_AS:
        raise CommandError(f"{path}: can't tell the picture's format: the name must end in {', '.join(_SAVED_AS)}")
    if not output.parent.is_dir():
        raise CommandError(f"{path} can't be written: there is no folder {output.parent}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise CommandError(f"{path} can't be written: permission denied")
    return output


def save_picture(picture, output: Path) -> None:
    try:
        picture.save(output)
    except OSError as error:
        raise CommandError(f"{output} can't be written: {error.strerror or one_line(error)}") from None
