"""What a run says while it goes on: a CSV file, TensorBoard if it is there, a live line, and a curve at the end."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import sys
import time
from pathlib import Path

from vit_fast.terminal import CommandError, note
from vit_fast.train.state import write_whole

COLUMNS = ("step", "epoch", "seconds", "lr", "loss", "accuracy", "grad_norm", "images_per_second", "val_loss", "val_accuracy")


class Log:
    """``log.csv`` in the run's folder, one row for each logged step; a resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, step: int, tensorboard: bool | None):
        self.path = folder / "log.csv"
        self.rows = [row for row in _rows(self.path) if row["step"] <= step]
        write_whole(self.path, lambda file: file.write(_as_csv(self.rows, header=True)))
        self._file = open(self.path, "ab", buffering=0)
        self._board = _board(folder, step, tensorboard)

    def write(self, row: dict) -> None:
        self.rows.append(row)
        try:
            self._file.write(_as_csv([row]))
        except OSError as error:
            raise CommandError(f"{self.path} can't be written: {error.strerror}; the checkpoints are whole") from None
        if self._board is not None:
            try:
                for name, value in row.items():
                    if name not in ("step", "seconds"):
                        self._board.add_scalar(name, value, row["step"])
            except OSError as error:
                note(f"TensorBoard's log ends here: {error.strerror}")
                self._board = None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def _as_csv(rows: list[dict], header: bool = False) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue().encode()


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                values = {name: float(text) for name, text in row.items() if name in COLUMNS and text}
                rows.append({**values, "step": int(values["step"])})
            except (ValueError, KeyError):  # the last line of a process that was killed
                continue
    return rows


def _board(folder: Path, step: int, wanted: bool | None):
    if wanted is False:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        if wanted:
            raise CommandError("--tensorboard needs tensorboard: pip install tensorboard")
        return None
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    except OSError as error:
        raise CommandError(f"{folder / 'tensorboard'} can't be written: {error.strerror}") from None


# ---- On the terminal ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def live(total: int, done: int, quiet: bool):
    """A line on stderr, while it is a terminal: a bar, and whatever text the function that this gives is called with."""
    if quiet or not sys.stderr.isatty():
        yield lambda step, text: None
        return
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        yield _plain_line(total)
        sys.stderr.write("\n")
        return
    columns = [
        progress.BarColumn(24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    ]
    console = Console(stderr=True)
    # What is printed meanwhile goes above the bar; but stays on stdout where that is a file.
    options = dict(transient=True, refresh_per_second=2, redirect_stdout=sys.stdout.isatty())
    with progress.Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("training", total=total, completed=done, text="")
        yield lambda step, text: bar.update(task, completed=step, text=text)


def _plain_line(total: int):
    last = 0.0

    def show(step: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            sys.stderr.write(f"\r{step}/{total} {text}   ")
            sys.stderr.flush()

    return show


# ---- The curve ------------------------------------------------------------------------------------------------------


def draw_curve(rows: list[dict], path: Path) -> Path | None:
    """Loss and accuracy over the steps, as a picture; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        note("no curve was drawn: pip install matplotlib")
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, label in ((what, "training"), (f"val_{what}", "validation")):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if name != what else None, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_title(what)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_yscale("log")
    FigureCanvasAgg(figure).print_png(str(path))
    return path
