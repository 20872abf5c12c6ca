#!/usr/bin/env python3
"""From the measurements under bench/results: README's results, their plots, and the choices that ship (make results).

    python bench/results.py [--check]

bench/results/<device>/<name>.json is what `vit-fast bench --json` or `make gpu` wrote; this program changes nothing there but
the plots beside it. README's part between the two marks is written anew, and vit_fast/tables gets a file for each device with
the implementation of each operation that was fastest. --check writes nothing: exit code 1 where something is not what the
measurements say.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from vit_fast import tuning  # noqa: E402
from vit_fast.benchmarks import page, tables  # noqa: E402
from vit_fast.benchmarks.models import BASE  # noqa: E402
from vit_fast.benchmarks.operations import BASE as STOCK  # noqa: E402
from vit_fast.benchmarks.record import read, slug_of  # noqa: E402

RESULTS, TABLES, README = ROOT / "bench" / "results", ROOT / "vit_fast" / "tables", ROOT / "README.md"
BEGIN, END = "<!-- results: written by make results -->\n", "<!-- end of results -->"
PLOTTED = ("forward",)


def records() -> dict[Path, dict]:
    """What was measured, the devices in the order of their names and of each the oldest first."""
    # Those of train_step.py and train_seeds.py say what they say by themselves.
    found = {path: read(path) for path in sorted(RESULTS.glob("*/*.json")) if not path.name.startswith("training-")}
    for path, data in found.items():
        if data["failed"] or data["environment"]["smoke"]:
            raise SystemExit(f"{path}: a smoke run, or one with failures, is no result")
        if path.parent.name != slug_of(data["environment"]):
            raise SystemExit(f"{path}: its folder should be {slug_of(data['environment'])}")
    return dict(sorted(found.items(), key=lambda item: (item[0].parent.name, item[1]["environment"]["date"])))


def markdown(headers: list[str], lines: list[list[str]]) -> str:
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


# ---- README ---------------------------------------------------------------------------------------------------------


def section(found: dict[Path, dict], plots: dict[Path, str]) -> str:
    """What stands between the marks."""
    parts = []
    for path, data in found.items():
        e = data["environment"]
        family = f" (family {e['family']}, {e['capability']})" if e.get("family") else ""
        threads = f", {e['threads']} threads" if "multiprocessors" not in e else ""
        versions = ", ".join(f"{name} {e[name]}" for name in ("triton", "driver") if e.get(name))
        parts.append(f"### {e['device']}{family}{threads}, torch {e['torch'].partition('+')[0]}\n")
        parts.append(
            f"{e['date'][:10]}, {versions}, commit {e['commit']}{' and changes' if e['dirty'] else ''};"
            f" every figure: `{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}`. {_ceilings(data)}\n"
        )
        for text in (_models(data["rows"]), _pictures(path, plots), _operations(data["rows"]), _overhead(data["rows"])):
            if text:
                parts.append(text)
    return "\n".join(parts)


def _ceilings(data: dict) -> str:
    c = data["ceilings"]
    rates = {tables.dtype_name(name): 1e3 * rate for name, rate in c["products_tflop_s"].items()}
    products = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
    return f"Ceilings measured in the same run: a copy at {1e3 * c['copy_tb_s']:,.1f} GB/s, products at {products}."


def _models(rows: list[dict]) -> str:
    columns = tables.groups_of(rows, "model", ("direction", "shape", "dtype"))
    if not columns:
        return ""
    columns = dict(sorted(columns.items(), key=lambda item: item[0][0] != "forward"))  # training behind it
    names = list(dict.fromkeys(row["contender"] for row in rows if row["group"] == "model"))
    headers, cells, order = [""], {name: [] for name in names}, dict.fromkeys(names, 0.0)
    for (direction, shape, dtype), group in columns.items():
        headers.append(f"{shape}, {tables.dtype_name(dtype)}, {direction}")
        by_name = {row["contender"]: row for row in group}
        base = by_name.get(BASE)
        for name in names:
            row = by_name.get(name)
            times = tables.ratio(base, row)[0] if base and row else 0.0
            order[name] = max(order[name], times)
            known = base and row and "kept_mib" in base and "kept_mib" in row
            kept = f", {row['kept_mib'] / base['kept_mib']:.2f} kept" if known else ""
            cells[name].append(f"{tables.milliseconds(row['ms'])}, {times:.2f}x{kept}" if row else "")
    ordered = sorted(names, key=lambda name: -order[name])
    lines = [[f"**{name}**" if page.ours(name) else name, *cells[name]] for name in ordered]
    what = f"Whole models: median time, and how many times as fast as the {BASE}, by turns in one run; ours in bold.\n"
    if any("kept_mib" in row for row in rows):
        what += f"Kept: the memory that a forward pass keeps for the backward pass, of what the {BASE} keeps.\n"
    return what + "\n" + markdown(headers, lines)


def _operations(rows: list[dict]) -> str:
    columns = tables.groups_of(rows, "operation", ("shape", "dtype"))
    if not columns:
        return ""
    names = list(dict.fromkeys((row["op"], row["variant"]) for row in rows if row["group"] == "operation"))
    headers, cells = ["forward / backward"], {name: [] for name in names}
    for (shape, dtype), group in columns.items():
        headers.append(f"{shape}, {tables.dtype_name(dtype)}")
        for name in names:
            cells[name].append(" / ".join(_best(group, name, direction) for direction in ("forward", "backward")))
    lines = [[f"`{op}` {variant}".strip(), *cells[op, variant]] for op, variant in names]
    what = "The operations: how many times as fast as stock PyTorch the best of ours is.\n\n"
    return what + markdown(headers, lines)


def _best(group: list[dict], name: tuple[str, str], direction: str) -> str:
    those = [row for row in group if (row["op"], row["variant"], row["direction"]) == (*name, direction)]
    base = next((row for row in those if row["contender"] == STOCK), None)
    ours = [tables.ratio(base, row)[0] for row in those if base and row["contender"] in tables.OURS]
    return f"{max(ours):.2f}" if ours else "–"


def _overhead(rows: list[dict]) -> str:
    found = tables.groups_of(rows, "overhead", ("op", "direction", "dtype"))
    lines = []
    for (op, direction, dtype), group in found.items():
        by_name = {row["contender"]: 1e3 * row["ms"] for row in group}
        if {"stock", "auto"} <= by_name.keys():
            lines.append(
                [f"`{op}`, {direction}, {tables.dtype_name(dtype)}", f"{by_name['stock']:.1f}", f"{by_name['auto']:.1f}"]
            )
    if not lines:
        return ""
    what = "What a call costs where hardly anything is computed (one image of 32 pixels, 64 channels), in microseconds.\n\n"
    return what + markdown(["", "stock PyTorch", "vit_fast"], lines)


def _pictures(path: Path, plots: dict[Path, str]) -> str:
    shown = [plot for plot in plots if plot.parent == path.parent and plot.name.startswith(path.stem + "-")]
    lines = [f"![{p.stem}]({p.relative_to(ROOT).as_posix() if p.is_relative_to(ROOT) else p.name})" for p in shown]
    return "\n".join(lines) + "\n" if lines else ""


def plots_of(found: dict[Path, dict]) -> dict[Path, str]:
    """{file: SVG}: speed-ups of inference, and throughput against the batch."""
    plots = {}
    for path, data in found.items():
        rows = [row for row in data["rows"] if row["direction"] in PLOTTED]
        for title, svg in (*page.speed_ups(rows), *page.throughput(rows)):
            name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            plots[path.with_name(f"{path.stem}-{name}.svg")] = svg
    return plots


def readme_with(text: str, written: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md: the marks {BEGIN.strip()} and {END} are not there")
    return before + BEGIN + "\n" + written + "\n" + END + after


# ---- The choices that ship ------------------------------------------------------------------------------------------


def shipped_tables(found: dict[Path, dict]) -> dict[str, tuple[dict, dict, str, list]]:
    """{file name: (identity, versions, date, choices)}, later measurements having the last word."""
    made: dict[str, tuple[dict, dict, str, list]] = {}
    for data in found.values():
        choices = tuning.choices_from(data["rows"])
        if not choices:
            continue
        e = data["environment"]
        keys = ("capability", "multiprocessors") if "multiprocessors" in e else ("family", "capability", "threads")
        identity = {"name": e["device"], **{key: e[key] for key in keys}}
        versions = {key: e.get(key) for key in ("vit_fast", "torch", "triton")}
        name = tuning.file_name(identity)
        kept = {c.key: c for c in (made[name][3] if name in made else [])}
        kept |= {c.key: c for c in choices}
        made[name] = (identity, versions, e["date"], list(kept.values()))
    return made


def _table_text(parts, scratch: Path) -> str:
    tuning.write_file(scratch, *parts)
    try:
        return scratch.read_text(encoding="utf-8")
    finally:
        scratch.unlink()


def wanted() -> dict[Path, str]:
    """Every file that follows from the measurements, and what is to stand in it."""
    found = records()
    plots = plots_of(found)
    files = dict(plots)
    TABLES.mkdir(exist_ok=True)
    for name, parts in shipped_tables(found).items():
        files[TABLES / name] = _table_text(parts, TABLES / f"{name}.new")
    files[README] = readme_with(README.read_text(encoding="utf-8"), section(found, plots))
    return files


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    args = p.parse_args(argv)
    files = wanted()
    old = {path for folder, kind in ((RESULTS, "*/*.svg"), (TABLES, "*.json")) for path in folder.glob(kind)} - set(files)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in [*stale, *old]:
        print(f"{path.relative_to(ROOT)}: {'not what was measured' if path in files else 'nothing was measured for it'}")
        if not args.check and path in files:
            path.write_text(files[path], encoding="utf-8")
        elif not args.check:
            path.unlink()
    return 1 if args.check and (stale or old) else 0


if __name__ == "__main__":
    sys.exit(main())
