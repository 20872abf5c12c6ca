"""What the command line prints: tables, bars, progress, and errors that a user can mend.

Results go to stdout, progress to stderr. Colours and live bars appear on a terminal only, so that what is piped into a file
is plain text, at most about 100 columns wide.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType


class CommandError(Exception):
    """Something a user can mend: `vit_fast.cli.main` prints it as one line and exits with 2."""


def one_line(error: BaseException | str, most: int = 4) -> str:
    """The text on one line; of more than ``most`` lines the first ones and how many there are besides."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > most:
        lines[most:] = [f"and {len(lines) - most} more"]
    if len(lines) < 2:
        return "".join(lines) or type(error).__name__
    headline = lines[0] if lines[0].endswith(":") else lines[0] + ";"
    return f"{headline} {'; '.join(lines[1:])}"


def note(text: str) -> None:
    """A remark about the result, on stderr."""
    print(f"vit-fast: note: {text}", file=sys.stderr)


def needs(command: str, module: str) -> ModuleType:
    """A module of the ``cli`` extra; CommandError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        package = {"PIL": "pillow"}.get(missing, missing)
        raise CommandError(f"{command} needs {package}: pip install 'vit_fast[cli]'") from None


# ---- Text -----------------------------------------------------------------------------------------------------------

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def styled(text: str, style: str) -> str:
    """The text in a style, on a terminal; unchanged elsewhere, or where the variable NO_COLOR is set (no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, styles: Sequence[str] = ()) -> str:
    """Rows below their headers, indented by two; the first ``left`` columns flush left, the others flush right.

    ``styles`` has a style for the last column of each row, or is empty.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for i, row in enumerate([headers, *rows]):
        cells = [c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        if i == 0:
            lines.append("  " + styled("  ".join(cells).rstrip(), "dim"))
        else:
            cells[-1] = styled(cells[-1].rstrip(), styles[i - 1]) if styles else cells[-1]
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def bar(fraction: float, width: int) -> str:
    """A horizontal bar for a number from 0 to 1, padded to its width; of ``#`` where the output can't encode blocks."""
    blocks = "▏▎▍▌▋▊▉█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ("#" * round(fraction * width)).ljust(width)
    eighths = round(fraction * width * 8)
    text = blocks[-1] * (eighths // 8) + (blocks[eighths % 8 - 1] if eighths % 8 else "")
    return text.ljust(width)


# ---- Progress -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr while the block runs; gives the function that moves it by one of ``total`` steps.

    Without a total it only shows that something is going on. It leaves nothing behind. Where stderr is no terminal it prints
    nothing at all; where rich is not installed it is a plain counter.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ModuleNotFoundError:
        with _counter(label, total) as advance:
            yield advance
        return
    columns = [rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(30)]
    columns += [rich_progress.TaskProgressColumn()] if total else []
    columns.append(rich_progress.TimeElapsedColumn())
    # Twice a second: what is timed meanwhile should not notice.
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as live:
        task = live.add_task(label, total=total)
        yield lambda: live.advance(task)


@contextlib.contextmanager
def _counter(label: str, total: int | None) -> Iterator[Callable[[], None]]:
    done = 0

    def show() -> None:
        sys.stderr.write(f"\r{label} {100 * done // total:3d} %" if total else f"\r{label} …")
        sys.stderr.flush()

    def advance() -> None:
        nonlocal done
        done += 1
        show()

    show()
    try:
        yield advance
    finally:
        sys.stderr.write("\r" + " " * (len(label) + 6) + "\r")
