"""What is said about measurements: tables, comparisons, the page, and README, which must say what the committed files do."""

import json
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_support import ENVIRONMENT, model, record, row

from vit_fast import tuning
from vit_fast.benchmarks import compare, drawing, page, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import results

    yield results
    sys.modules.pop("results")


# ---- Tables ---------------------------------------------------------------------------------------------------------


def test_what_was_lost_to_stock_pytorch():
    rows = [
        row("torch", 1.2, op="attention"),
        row("torch+cudnn", 1.0, op="attention"),
        row("triton", 1.1, op="attention"),
        row("torch", 1.0, op="mlp"),
        row("triton", 1.01, op="mlp"),
        model("timm", 5.0),
        model("freeze()", 6.0),
        model("plain", 9.0),
    ]
    first, second = tables.lost(rows)
    assert first.startswith("model forward B/16@224 b1 fp32: freeze()") and "1.20 times" in first
    assert second.startswith("attention forward B/16@224 b1 fp32: triton") and "torch+cudnn" in second


def test_speed_ups_are_of_rounds_where_there_were_any():
    by_turns = model("plain", 50.0, against="reference", speed_up=1.7, speed_up_p20=1.6, speed_up_p80=1.8)
    told = tables.speed_ups([model("reference", 100.0), by_turns, model("timm", 80.0)])
    lines = told.splitlines()
    assert "1.70x" in lines[2] and "plain" in lines[2] and "1.25x" in lines[3] and "timm" in lines[3]


def test_reasons_are_told_once():
    skipped = [f"model B/16@224 b{n} fp32 timm compiled: timm is not installed" for n in (1, 8)]
    assert tables.reasons(skipped) == ["timm is not installed: timm compiled"]


def test_all_tables():
    rows = [row("torch", 1.0), row("cpp", 0.5), model("reference", 9.0), model("freeze()", 3.0)]
    rows.append(row("auto", 0.01, group="overhead", extra_us=1.5))
    told = "\n".join((*tables.operations(rows), *tables.overhead(rows), *tables.models(rows)))
    for text in ("2.00x", "3.00x", "+1.5 µs", "0.50 ms", "B/16@224 b1, float32"):
        assert text in told, text


# ---- Two files ------------------------------------------------------------------------------------------------------


def test_compare_tells_a_change_from_noise():
    before = record([row("torch", 1.0), row("cpp", 1.0), row("cpp", 1.0, op="mlp"), row("cpp", 1.0, op="linear", spread=0.5)])
    after = record([row("torch", 1.0), row("cpp", 0.5), row("cpp", 2.0, op="mlp"), row("cpp", 1.4, op="linear", spread=0.5)])
    found = {c.after["op"] + c.after["contender"]: c for c in compare.changes(before, after)}
    assert {name for name, c in found.items() if c.beyond_noise} == {"layer_normcpp", "mlpcpp"}
    told = compare.told(before, after)
    assert "1 faster beyond the noise" in told and "1 slower beyond the noise" in told and "4 rows in both files" in told
    assert "runs 1.00x as fast as before" in told


def test_compare_says_what_else_differs():
    told = compare.told(record([row("torch", 1.0)]), record([row("torch", 2.0), row("cpp", 1.0)], torch="2.14.0"))
    assert "torch: 2.13.0 before, 2.14.0 now" in told and "0 only in the first, 1 only in the second" in told
    assert "runs 0.50x as fast" in told


# ---- The page -------------------------------------------------------------------------------------------------------


class _Checker(HTMLParser):
    """Every tag closed, nothing taken from elsewhere."""

    void = {"meta", "line", "rect", "circle", "polyline"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        assert tag not in ("script", "link", "img", "iframe") and not {"src", "href"} & dict(attributes).keys()
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else():
    rows = [row("torch", 1.0), row("cpp", 0.5), row("auto", 0.01, group="overhead", extra_us=1.5)]
    for batch in (1, 8):
        rows += [model(name, ms * batch, shape=f"B/16@224 b{batch}") for name, ms in (("reference", 9.0), ("freeze()", 3.0))]
    data = record(rows, device="A <b>CPU</b> & more")
    data["skipped"], data["failed"] = ["model x: <none>"], ["it & that"]
    text = page.html(data)
    checker = _Checker()
    checker.feed(text)
    assert checker.open == [] and {"svg", "table", "h1"} <= checker.seen
    assert "A &lt;b&gt;CPU&lt;/b&gt; &amp; more" in text and "<b>" not in text and "it &amp; that" in text
    assert text.count("<svg") == 6  # speed-up and time for each batch, throughput, operations
    assert "@import" not in text and "url(" not in text


def test_plots_are_xml():
    bars = drawing.bars(
        "t & t", "ms", [drawing.Bar("a<b", 2.0, 1.5, 2.5, "2", True, 1.0), drawing.Bar("c", 4.0, 4.0, 4.0, "4")]
    )
    lines = drawing.lines("t", "x", "y", {"a": [(1, 2.0), (8, 4.0)], "b": [(1, 1.0)]})
    one = drawing.lines("t", "x", "y", {"a": [(4, 2.0)]})
    for svg in (bars, lines, one):
        assert ET.fromstring(svg).tag.endswith("svg")
    widths = [float(r.get("width")) for r in ET.fromstring(bars).iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-2)


@pytest.mark.parametrize("most", [0.003, 1, 7.3, 120, 99999])
def test_ticks_are_round_and_few(most):
    found = drawing.ticks(most)
    assert found[0] == 0 and found[-1] <= most * (1 + 1e-9) and 3 <= len(found) <= 6


# ---- README and what ships ------------------------------------------------------------------------------------------


def test_readme_and_what_ships_are_what_was_measured(results):
    stale = [str(p.relative_to(ROOT)) for p, text in results.wanted().items() if not p.exists() or p.read_text("utf-8") != text]
    assert stale == [], "make results writes them anew"


def test_a_figure_that_was_not_measured_is_noticed(results, tmp_path, monkeypatch, capsys):
    """The whole way: a file of measurements, what follows from it, and a change in any of those."""
    folder = tmp_path / "results" / "test-avx2"
    folder.mkdir(parents=True)
    rows = [row("torch", 1.0), row("cpp", 0.5), model("reference", 9.0), model("freeze()", 3.0)]
    (folder / "cpu.json").write_text(json.dumps(record(rows)))
    (tmp_path / "README.md").write_text(f"before\n{results.BEGIN}{results.END}\nafter\n")
    for name, path in (("ROOT", ""), ("RESULTS", "results"), ("TABLES", "tables"), ("README", "README.md")):
        monkeypatch.setattr(results, name, tmp_path / path)
    assert results.main(["--check"]) == 1 and results.main([]) == 0 and results.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "### Test CPU (family 1-2, AVX2), 2 threads, torch 2.13.0" in text and "| **freeze()** | 3.00 ms, 3.00x |" in text
    assert "| `layer_norm` | 2.00 / – |" in text and "400 GFLOP/s in float32" in text
    plot = folder / "cpu-b-16-224-b1-float32-forward-speed-up.svg"
    assert f"({plot.relative_to(tmp_path).as_posix()})" in text and plot.is_file()
    (shipped,) = (tmp_path / "tables").iterdir()
    content = tuning._content(shipped)
    assert shipped.name == tuning.file_name(content["identity"]) and [c.taken for c in content["choices"]] == ["cpp"]
    capsys.readouterr()
    for path in (tmp_path / "README.md", plot, shipped):
        before = path.read_text()
        path.write_text(before.replace("3.00x", "3.50x").replace('"cpp"', '"torch"'))
        assert path.read_text() != before
        assert results.main(["--check"]) == 1 and str(path.relative_to(tmp_path)) in capsys.readouterr().out
        path.write_text(before)
    (folder / "cpu.json").unlink()
    assert results.main(["--check"]) == 1 and results.main([]) == 0
    assert not plot.exists() and not shipped.exists()


@pytest.mark.parametrize("change", [{"failed": ["x"]}, {"environment": ENVIRONMENT | {"smoke": True}}])
def test_a_run_with_failures_is_no_result(results, tmp_path, monkeypatch, change):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    folder = tmp_path / "test-avx2"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps(record([row("torch", 1.0)]) | change))
    with pytest.raises(SystemExit, match="is no result"):
        results.records()
