"""A record as one HTML file that needs nothing else: the machine, plots, tables."""

from __future__ import annotations

from html import escape

from vit_fast.benchmarks import drawing, tables
from vit_fast.benchmarks.drawing import Bar
from vit_fast.benchmarks.models import BASE
from vit_fast.benchmarks.operations import BASE as STOCK

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { text-align: right; padding: 2px 10px; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.faster { color: #2b8a3e; } td.slower { color: #d9480f; }
div.table { overflow-x: auto; } svg { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
"""
_TOLD = ("device", "date", "commit", "dirty", "vit_fast", "torch", "triton", "python", "threads", "instruction_set")
_TOLD += ("capability", "clock_mhz", "load_at_start", "cuda", "cudnn", "nvidia_smi")
_TOLD += ("timm", "transformers", "torchvision", "onnxruntime", "openvino")


def ours(name: str) -> bool:
    return name.startswith(("plain", "freeze", "triton", "cpp", "auto"))


def _table(headers: list[str], lines: list[list[str]], classes: list[str] | None = None) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = []
    for i, cells in enumerate(lines):
        last = f' class="{classes[i]}"' if classes and classes[i] else ""
        marked = [f"<td{last if n == len(cells) - 1 else ''}>{escape(cell)}</td>" for n, cell in enumerate(cells)]
        body.append(f"<tr>{''.join(marked)}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


# ---- Plots ----------------------------------------------------------------------------------------------------------


def latency(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, plot) of every contender's time, for each shape, dtype and direction."""
    found = []
    for (direction, shape, dtype), group in tables.groups_of(rows, "model", ("direction", "shape", "dtype")).items():
        title = f"{shape}, {tables.dtype_name(dtype)}, {direction}: time"
        bars = [
            Bar(row["contender"], row["ms"], row["p20"], row["p80"], tables.milliseconds(row["ms"]), ours(row["contender"]))
            for row in sorted(group, key=lambda row: row["ms"])
        ]
        found.append((title, drawing.bars(title, "milliseconds: median, p20 to p80", bars)))
    return found


def speed_ups(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, plot) of every contender's speed as a multiple of the reference's."""
    found = []
    for (direction, shape, dtype), group in tables.groups_of(rows, "model", ("direction", "shape", "dtype")).items():
        base = next((row for row in group if row["contender"] == BASE), None)
        if base is None:
            continue
        title = f"{shape}, {tables.dtype_name(dtype)}, {direction}: speed-up"
        ratios = {row["contender"]: tables.ratio(base, row) for row in group}
        bars = [
            Bar(name, middle, low, high, f"{middle:.2f}x", ours(name))
            for name, (middle, low, high) in sorted(ratios.items(), key=lambda item: -item[1][0])
        ]
        found.append((title, drawing.bars(title, f"times as fast as the {BASE}", bars)))
    return found


def throughput(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, plot) of images a second against the batch, for models that were timed at several."""
    found = []
    forward = [dict(row, model=row["shape"].partition(" b")[0]) for row in rows if row["direction"] == "forward"]
    for (model, dtype), group in tables.groups_of(forward, "model", ("model", "dtype")).items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in group:
            batch = float(row["shape"].rpartition(" b")[2])
            series.setdefault(row["contender"], []).append((batch, row["images_per_s"]))
        if len({x for points in series.values() for x, _ in points}) > 1:
            title = f"{model}, {tables.dtype_name(dtype)}: throughput against batch"
            order = sorted(series, key=lambda name: -max(y for _, y in series[name]))
            plot = drawing.lines(title, "images a call", "images a second", {name: series[name] for name in order})
            found.append((title, plot))
    return found


def operations(rows: list[dict]) -> list[tuple[str, str]]:
    """(what, plot) of every operation's time beside its floor."""
    found = []
    for (shape, dtype, direction), group in tables.groups_of(rows, "operation", ("shape", "dtype", "direction")).items():
        title = f"{shape}, {tables.dtype_name(dtype)}, {direction}: operations"
        bars = [
            Bar(
                f"{row['op']} {row['variant']}".strip() + f", {row['contender']}",
                row["ms"], row["p20"], row["p80"], tables.milliseconds(row["ms"]), ours(row["contender"]), row["floor_ms"],
            )
            for row in group
        ]  # fmt: skip
        found.append((title, drawing.bars(title, "milliseconds; the green mark is the floor that the ceilings allow", bars)))
    return found


# ---- The page -------------------------------------------------------------------------------------------------------


def _model_tables(rows: list[dict]) -> list[str]:
    told = []
    for (direction, shape, dtype), group in tables.groups_of(rows, "model", ("direction", "shape", "dtype")).items():
        base = next((row for row in group if row["contender"] == BASE), None)
        lines = [
            [
                row["contender"],
                tables.milliseconds(row["ms"]),
                f"{tables.milliseconds(row['p20'])} - {tables.milliseconds(row['p80'])}",
                f"{row['images_per_s']:,.1f}",
                f"{row['tflop_s']:.3g}",
                f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else "",
                str(row["samples"]),
                f"{tables.ratio(base, row)[0]:.2f}x" if base else "",
            ]
            for row in sorted(group, key=lambda row: row["ms"])
        ]
        headers = ["", "median", "p20 - p80", "images/s", "TFLOP/s", "of product", "samples", f"x of {BASE}"]
        told.append(f"<h3>{escape(f'{shape}, {tables.dtype_name(dtype)}, {direction}')}</h3>" + _table(headers, lines))
    return told


def _operation_tables(rows: list[dict]) -> list[str]:
    told = []
    for (shape, dtype), group in tables.groups_of(rows, "operation", ("shape", "dtype")).items():
        lines, classes = [], []
        for key, those in tables.groups_of(group, "operation", ("op", "variant", "direction")).items():
            base = next((row for row in those if row["contender"] == STOCK), None)
            for row in those:
                middle, low, high = tables.ratio(base, row) if base else (0, 0, 0)
                lines.append(
                    [
                        " ".join(filter(None, key)),
                        row["contender"],
                        tables.milliseconds(row["ms"]),
                        f"{row['gb_s']:,.1f}",
                        f"{row['tflop_s']:.3g}" if row["tflop_s"] else "",
                        tables.milliseconds(row["floor_ms"]),
                        f"{100 * row['of_ceiling']:.0f} %",
                        f"{middle:.2f}x ({low:.2f}-{high:.2f})" if base and row is not base else "",
                    ]
                )
                classes.append("slower" if base and high < 1 else "faster" if base and low > 1 else "")
        headers = ["", "", "median", "GB/s", "TFLOP/s", "floor", "of it", f"x of {STOCK} (p20-p80)"]
        told.append(f"<h3>{escape(f'{shape}, {tables.dtype_name(dtype)}')}</h3>" + _table(headers, lines, classes))
    return told


def _overhead_table(rows: list[dict]) -> list[str]:
    lines = [
        [
            f"{row['op']}, {row['direction']}, {tables.dtype_name(row['dtype'])}",
            row["contender"],
            f"{1000 * row['ms']:.1f}",
            f"{row['extra_us']:+.1f}" if "extra_us" in row else "",
        ]
        for row in rows
        if row["group"] == "overhead"
    ]
    return [_table(["", "", "µs a call", "beside stock"], lines)] if lines else []


def html(data: dict) -> str:
    """The page of a record."""
    rows, environment = data["rows"], data["environment"]
    title = f"vit_fast on {environment['device']}"
    machine = [[name, str(environment[name])] for name in _TOLD if environment.get(name) is not None]
    if data.get("ceilings"):
        machine.append(["a large copy", f"{1e3 * data['ceilings']['copy_tb_s']:.1f} GB/s"])
        products = data["ceilings"]["products_tflop_s"]
        machine += [[f"a large product, {tables.dtype_name(name)}", f"{rate:.3g} TFLOP/s"] for name, rate in products.items()]
    sections: list[tuple[str, list[str]]] = [
        ("Whole models", [plot for _, plot in (*speed_ups(rows), *throughput(rows), *latency(rows))] + _model_tables(rows)),
        ("Operations", [plot for _, plot in operations(rows)] + _operation_tables(rows)),
        ("What a call costs", _overhead_table(rows)),
        ("Lost to others", _items(tables.lost(rows))),
        ("Failed", _items(data["failed"])),
        ("Left out", _items(tables.reasons(data["skipped"]))),
    ]
    body = [f"<h1>{escape(title)}</h1>", _table(["", ""], machine)]
    for heading, parts in sections:
        if parts:
            body += [f"<h2>{escape(heading)}</h2>", *parts]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _items(lines: list[str]) -> list[str]:
    return ["<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"] if lines else []
