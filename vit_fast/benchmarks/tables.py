"""Rows as text: for people, and with the summary last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from vit_fast.benchmarks.models import BASE, FROZEN
from vit_fast.benchmarks.operations import BASE as STOCK
from vit_fast.terminal import styled, table

LOST = 1.02  # slower than stock PyTorch by more than the noise
OURS = ("triton", "cpp")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def milliseconds(ms: float) -> str:
    return f"{1000 * ms:.3g} µs" if ms < 0.1 else f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f} ms"


def dtype_name(label: str) -> str:
    return _DTYPES.get(label, label)


def groups_of(rows: Iterable[dict], group: str, by: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """The rows of a group that agree in those fields, in the order in which they were measured."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["group"] == group:
            found.setdefault(tuple(row[name] for name in by), []).append(row)
    return found


def ratio(base: dict, row: dict) -> tuple[float, float, float]:
    """How many times as fast as the base a row is: median, p20, p80; of the rounds where the two were timed by turns."""
    if row.get("against") == base["contender"]:
        return row["speed_up"], row["speed_up_p20"], row["speed_up_p80"]
    return base["ms"] / row["ms"], base["p20"] / row["p80"], base["p80"] / row["p20"]


def _times(value: float) -> str:
    return f"{value:.2f}x"


# ---- Tables ---------------------------------------------------------------------------------------------------------


def models(rows: list[dict]) -> list[str]:
    """A table for each shape, dtype and direction of whole models."""
    told = []
    for (direction, shape, dtype), group in groups_of(rows, "model", ("direction", "shape", "dtype")).items():
        base = next((row for row in group if row["contender"] == BASE), None)
        frozen = next((row for row in group if row["contender"] == FROZEN), None)
        lines = []
        for row in sorted(group, key=lambda row: row["ms"]):
            cells = [row["contender"], milliseconds(row["ms"]), f"{milliseconds(row['p20'])} - {milliseconds(row['p80'])}"]
            cells += [f"{row['images_per_s']:,.1f}", f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else ""]
            cells.append(_times(ratio(base, row)[0]) if base else "")
            if direction == "forward":
                cells.append(_times(row["ms"] / frozen["ms"]) if frozen else "")
            else:
                cells.append(kept(base, row))
            lines.append(cells)
        last = f"{FROZEN} is" if direction == "forward" else "kept for backward"
        headers = ("", "median", "p20 - p80", "images/s", "of product", f"x of {BASE}", last)
        told.append(styled(f"{shape}, {dtype_name(dtype)}, {direction}", "bold") + "\n" + table(headers, lines))
    return told


def kept(base: dict | None, row: dict) -> str:
    """What the forward pass keeps for the backward pass, and of what the base keeps; nothing where it isn't known."""
    if "kept_mib" not in row:
        return ""
    known = base is not None and row is not base and "kept_mib" in base
    return f"{row['kept_mib']:,.0f} MiB" + (f" ({row['kept_mib'] / base['kept_mib']:.2f})" if known else "")


def operations(rows: list[dict]) -> list[str]:
    """A table for each shape and dtype: every operation's implementations beside stock PyTorch's."""
    told = []
    for (shape, dtype), group in groups_of(rows, "operation", ("shape", "dtype")).items():
        lines, styles = [], []
        for key, those in groups_of(group, "operation", ("op", "variant", "direction")).items():
            base = next((row for row in those if row["contender"] == STOCK), None)
            for row in those:
                name = " ".join(filter(None, key)) if row is those[0] else ""
                rate = f"{row['tflop_s'] * 1e3:,.0f} GFLOP/s" if row["tflop_s"] < 1 else f"{row['tflop_s']:,.1f} TFLOP/s"
                rate = rate if row["tflop_s"] else f"{row['gb_s']:,.1f} GB/s"
                cells = [name, row["contender"], milliseconds(row["ms"]), rate, milliseconds(row["floor_ms"])]
                cells.append(f"{100 * row['of_ceiling']:.0f} %")
                middle, low, high = ratio(base, row) if base else (0.0, 0.0, 0.0)
                cells.append(f"{_times(middle)} ({low:.2f}-{high:.2f})" if base and row is not base else "")
                lines.append(cells)
                styles.append("red" if base and high < 1 else "green" if base and low > 1 and row is not base else "dim")
        headers = ("", "", "median", "rate", "floor", "of it", f"x of {STOCK} (p20-p80)")
        title = styled(f"{shape}, {dtype_name(dtype)}, operations", "bold")
        told.append(title + "\n" + table(headers, lines, left=2, styles=styles))
    return told


def overhead(rows: list[dict]) -> list[str]:
    """What a call costs, beside stock PyTorch's."""
    lines = []
    for (op, direction, dtype), group in groups_of(rows, "overhead", ("op", "direction", "dtype")).items():
        for row in group:
            extra = f"{row['extra_us']:+.1f} µs" if "extra_us" in row else ""
            name = f"{op}, {direction}, {dtype_name(dtype)}" if row is group[0] else ""
            lines.append((name, row["contender"], f"{1000 * row['ms']:.1f} µs", extra))
    title = styled("A call on one tiny image, where the call is what costs", "bold")
    return [title + "\n" + table(("", "", "a call", "beside stock"), lines, left=2)] if lines else []


def speed_ups(rows: list[dict]) -> str:
    """Every contender's speed as a multiple of the reference's: one column for each shape."""
    columns = groups_of(rows, "model", ("direction", "shape", "dtype"))
    columns = {key: group for key, group in columns.items() if any(row["contender"] == BASE for row in group)}
    if not columns:
        return ""
    names = list(dict.fromkeys(row["contender"] for group in columns.values() for row in group))
    headers = [""]
    cells: dict[str, list[str]] = {name: [] for name in names}
    order = {name: 0.0 for name in names}
    for (direction, shape, dtype), group in columns.items():
        headers.append(f"{shape} {dtype}" + (" train" if direction == "training step" else ""))
        base = next(row for row in group if row["contender"] == BASE)
        by_name = {row["contender"]: row for row in group}
        for name in names:
            value = ratio(base, by_name[name])[0] if name in by_name else 0.0
            cells[name].append(_times(value) if value else "-")
            order[name] = max(order[name], value)
    lines = [(name, *cells[name]) for name in sorted(names, key=lambda name: -order[name])]
    return styled(f"How many times as fast as the {BASE} (the original's steps)", "bold") + "\n" + table(headers, lines)


# ---- Verdicts -------------------------------------------------------------------------------------------------------


def lost(rows: list[dict], ours: Callable[[dict], bool] | None = None) -> list[str]:
    """Where what is ours is slower than the best of what is not, on the same call: a line each, the worst first."""
    ours = ours or _is_ours
    told = []
    by = ("op", "variant", "direction", "shape", "dtype")
    for group in ("operation", "model"):
        for key, those in groups_of(rows, group, by).items():
            stock = [row for row in those if _is_stock(row)]
            best = min(stock, key=lambda row: row["ms"], default=None)
            for row in filter(ours, those):
                if best is not None and row["ms"] > LOST * best["ms"]:
                    times = row["ms"] / best["ms"]
                    name = " ".join(filter(None, key))
                    told.append(
                        (
                            times,
                            f"{name}: {row['contender']} {milliseconds(row['ms'])},"
                            f" {best['contender']} {milliseconds(best['ms'])} ({times:.2f} times)",
                        )
                    )
    return [line for _, line in sorted(told, key=lambda pair: -pair[0])]


def _is_ours(row: dict) -> bool:
    return row["contender"] in (*OURS, FROZEN) or (row["contender"] == "plain" and row["direction"] == "training step")


def _is_stock(row: dict) -> bool:
    if row["group"] == "operation":
        return row["contender"].startswith(STOCK)
    return not row["contender"].startswith(("plain", "freeze", BASE))


def reasons(skipped: Iterable[str]) -> list[str]:
    """What was left out, a line for each reason, with how much it was."""
    by_reason: dict[str, list[str]] = {}
    for line in skipped:
        what, _, reason = line.partition(": ")
        by_reason.setdefault(reason or line, []).append(what)
    told = []
    for reason, those in by_reason.items():
        names = list(dict.fromkeys(_brief(what) for what in those))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        told.append(f"{reason}: {shown}")
    return told


def _brief(what: str) -> str:
    """Of ``model B/16@224 b1 fp32 timm compiled`` what tells it from others that were left out for the same reason."""
    match = re.match(r"(?:model|training) \S+ b\d+ \S+ (.+)", what)
    return match[1] if match else what
