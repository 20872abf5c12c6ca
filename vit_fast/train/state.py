"""A run's folder and the checkpoints in it: written whole or not at all, the last few kept."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from vit_fast.terminal import CommandError, note, one_line

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")
FORMAT = 1


class Checkpoints:
    """The files ``checkpoint-00001200.pt`` in a folder; the number is that of the steps done.

    What they hold is plain containers and tensors, and is read with ``weights_only=True``: nothing is unpickled as objects.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))

    def write(self, step: int, content: dict) -> Path:
        """Beside its place first, then renamed: whenever the process ends, the files of that name are whole."""
        path = self.folder / f"checkpoint-{step:08d}.pt"
        write_whole(path, lambda file: torch.save({"format": FORMAT, "step": step, **content}, file))
        for old in self.paths()[: -self.keep]:
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def newest(self) -> dict | None:
        """The content of the newest one that can be read; None if there is none at all."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if content["format"] != FORMAT:
                    raise ValueError(f"its format is {content['format']}, here it is {FORMAT}")
                return content
            except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
                note(f"{path} can't be read, the one before is taken: {one_line(error, 1)}")
        if paths:
            raise CommandError(f"none of the {len(paths)} checkpoints in {self.folder} can be read: begin again elsewhere")
        return None


def write_whole(path: Path, write) -> None:
    """Calls ``write`` with a file beside the path, then puts it in its place. CommandError, and the old file, if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns some failures of the file into its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or one_line(error, 1)
        raise CommandError(f"{path} can't be written: {reason}; the checkpoints before it are whole") from None


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prepare_folder(folder: Path, resume: bool, bytes_needed: int) -> None:
    """Makes the run's folder and tries it: CommandError before anything is trained for nothing."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} is not a folder: a run needs one for its results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CommandError(f"{folder} can't be written to: {error.strerror or one_line(error)}") from None
    if free < bytes_needed:
        raise CommandError(
            f"{folder}: the run's checkpoints need {_megabytes(bytes_needed)}, the disk has {_megabytes(free)} left;"
            " keep fewer with --keep, or name another place"
        )
    if not resume and any(_NAME.fullmatch(path.name) for path in folder.iterdir()):
        raise CommandError(f"{folder} holds a run already: go on with it by --resume, or name another folder")
    for name in ("checkpoint-*", "model.safetensors.*", "log.csv.*"):  # of a process that was killed while it wrote
        for left in folder.glob(f".{name}.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
