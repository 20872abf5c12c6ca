"""What is measured and how: the work against hand arithmetic, the cases, times by turns, checks before times, the record."""

import functools
import json
import time

import pytest
import torch

from vit_fast import backends
from vit_fast.backends import OPERATIONS, Implementation
from vit_fast.benchmarks import cases, memory, models, operations, overhead, peers, roofline, suite, timing
from vit_fast.benchmarks.record import Record, key_of, read
from vit_fast.terminal import CommandError

TINY = cases.Shape(model="Ti", image=32, batch=2, patch=16, width=192, hidden=768, heads=3, layers=1)
CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(0.01, {"fp32": 0.2, "bf16": 0.2, "fp16": 0.2})
ENVIRONMENT = {"device": "a test", "threads": 1, "torch": "2", "vit_fast": "0", "commit": "c", "smoke": False}


@pytest.fixture(autouse=True)
def no_subject_from_before():
    models.subject_of.cache_clear()


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "rows.json", dict(ENVIRONMENT), say=lambda text: None)


# ---- The cost model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, image, gflop", [("S", 224, 9.20), ("B", 224, 35.13), ("L", 224, 123.1), ("H", 224, 334.6), ("B", 384, 111.0)]
)
def test_model_flops_are_those_counted_by_hand(model, image, gflop):
    s = cases.shape_of(model, image, batch=1)
    counted = roofline.model_flops(s.tokens, s.width, s.layers, s.hidden, s.patch) / 1e9
    assert counted == pytest.approx(gflop, rel=1e-3)


def test_tokens():
    assert [cases.shape_of(*of).tokens for of in (("B", 224), ("H", 224), ("B", 384))] == [197, 257, 577]


@pytest.mark.parametrize(
    "op, variant, direction, gflop, megabytes, floor_us",
    [  # B/16, batch 128, 16 bit: U = 128·197·768·2 bytes = 38.7 MB; ceilings 798 TFLOP/s and 3.0 TB/s
        ("layer_norm", "", "forward", 0, 77.5, 25.8),
        ("layer_norm", "+residual", "backward", 0, 155, 51.6),
        ("linear", "qkv", "forward", 89.2, 158, 111.8),
        ("linear", "out+residual", "forward", 29.7, 117, 39.1),
        ("linear", "fc1+gelu", "forward", 119, 198, 149.1),
        ("linear", "fc2+residual", "forward", 119, 237, 149.1),
        ("attention", "", "forward", 15.3, 155, 51.6),
        ("attention", "", "backward", 38.1, 310, 103.3),
        ("patch_embed", "uint8", "forward", 29.6, 59.5, 37.1),
    ],
)
def test_work_and_floors_are_those_counted_by_hand(op, variant, direction, gflop, megabytes, floor_us):
    work = cases.find(op, variant, cases.shape_of("B", 224, 128)).work(direction, 2)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=5e-3)
    assert work.bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)
    assert roofline.CEILINGS[90].floor_us(work, "bf16") == pytest.approx(floor_us, rel=5e-3)


def test_every_case_builds_what_its_operation_takes():
    for op in cases.OPS:
        for case in cases.cases_of(op, TINY):
            result = OPERATIONS[op].implementations["reference"].run(*case.arguments(cases.Maker("meta", torch.bfloat16)))
            first = result if isinstance(result, torch.Tensor) else result[0]
            assert first.shape[:2] == (2, 5), case.name
            assert case.work("backward", 2).bytes > 0


# ---- Times ----------------------------------------------------------------------------------------------------------


def test_by_turns_tells_a_slow_call_from_a_fast_one():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    taken = timing.by_turns({"a": call("a", 0.004), "b": call("b", 0.012)}, seconds=0.1, at_once_ms=0.0)
    assert len(taken["a"]) == len(taken["b"]) >= 7
    assert order[4:10] == ["a", "b"] * 3  # after two calls each to warm up
    assert timing.speed_up(taken["b"], taken["a"])["speed_up"] == pytest.approx(3, rel=0.4)
    timed = timing.summary(taken["a"], "turns")
    assert timed.p20 <= timed.ms <= timed.p80 and timed.ms >= 4


def test_short_calls_are_repeated():
    count = 0

    def run():
        nonlocal count
        count += 1

    rounds = timing.by_turns({"a": run}, seconds=0.0, least=3, at_once_ms=0.5)["a"]
    assert len(rounds) == 3 and count > 100 and max(rounds) < 0.5


def test_ceilings():
    found = timing.measure_ceilings(CPU, {"fp32": torch.float32}, tiny=True)
    assert found.copy_tb_s > 0 and found.products_tflop_s["fp32"] > 0
    assert found.floor_ms(0, 1e12, "fp32") == pytest.approx(1e3 / found.copy_tb_s)


# ---- Nothing that is wrong gets a time ------------------------------------------------------------------------------


def _break(monkeypatch, op, name, change):
    implementation = OPERATIONS[op].implementations["reference"]
    broken = Implementation(lambda *a: change(implementation.run(*a)), backends.anything)
    monkeypatch.setitem(OPERATIONS[op].implementations, name, broken)


def test_rows_of_an_operation(record):
    operations.measure(record, CEILINGS, cases.find("layer_norm", "+residual", TINY), "fp32", CPU, ("torch", "cpp"), 0.02)
    rows = record.rows
    assert {row["direction"] for row in rows} == {"forward", "backward"} and record.data["failed"] == []
    for row in rows:
        assert (
            row["checked"]
            and row["method"] == "turns"
            and row["of_ceiling"] == pytest.approx(row["floor_ms"] / row["ms"], 1e-3)
        )
        assert row["contender"] == "torch" or row["against"] == "torch"


def test_an_operation_beyond_the_budget_has_no_row(record, monkeypatch):
    _break(monkeypatch, "layer_norm", "cpp", lambda y: y * 1.001)
    operations.measure(record, CEILINGS, cases.find("layer_norm", "", TINY), "fp32", CPU, ("torch", "cpp"), 0.02)
    assert {row["contender"] for row in record.rows} == {"torch"}
    assert any("layer_norm" in line and "cpp" in line and "over the budget" in line for line in record.data["failed"])


def test_an_operation_that_raises_is_a_failure(record, monkeypatch):
    def fails(y):
        raise RuntimeError("no such kernel")

    _break(monkeypatch, "layer_norm", "cpp", fails)
    operations.measure(record, CEILINGS, cases.find("layer_norm", "", TINY), "fp32", CPU, ("torch", "cpp"), 0.02)
    assert {row["contender"] for row in record.rows} == {"torch"} and "no such kernel" in record.data["failed"][0]


def test_rows_of_a_model(record):
    names = {"reference", "plain", "plain torch", "freeze", "freeze all on", "original"}
    models.measure(record, TINY, "fp32", CPU, models.chosen(models.ON_CPU, names), seconds=0.1)
    found = {row["contender"]: row for row in record.rows}
    assert {name.replace("freeze", "freeze()") for name in names} == set(found) and record.data["failed"] == []
    for name, row in found.items():
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"], rel=1e-3) and row["checked"]
        assert name == "reference" or row["against"] == "reference"


def test_a_model_beyond_the_budget_has_no_row(record, monkeypatch):
    _break(
        monkeypatch, "mlp", "torch", lambda y: y * torch.linspace(1, 1.01, y.shape[-1])
    )  # a factor alone the norm takes away
    contenders = models.chosen(models.ON_CPU, {"reference", "plain torch"})
    models.measure(record, TINY, "fp32", CPU, [c for c in contenders if not c.mode], seconds=0.1)
    assert {row["contender"] for row in record.rows} == {"reference"}
    assert len(record.data["failed"]) == 1 and "plain torch: logits: error" in record.data["failed"][0]


def test_rows_of_a_training_step(record):
    contenders = [models.Contender.named(name) for name in ("reference", "plain", "original")]
    models.measure_training(record, TINY, "fp32", CPU, contenders, seconds=0.1)
    assert {row["contender"] for row in record.rows} == {"reference", "plain", "original"} and record.data["failed"] == []
    assert {row["direction"] for row in record.rows} == {"training step"}
    kept = {row["contender"]: row["kept_mib"] for row in record.rows}
    assert 0 < kept["plain"] < kept["reference"] or backends.backends()["cpp"] is not None


def test_what_is_kept_for_the_backward_pass():
    """What autograd saves, each piece of memory once, views as the memory that they are of, parameters not at all."""
    x, weight = torch.randn(10, 20), torch.randn(20, 30, requires_grad=True)
    kept = functools.partial(memory.kept_bytes, parameters=[weight], device=CPU)
    assert kept(lambda: (x @ weight).sum()) == x.nbytes
    assert kept(lambda: (x[:, :5] @ weight[:5]).sum()) == x.nbytes
    assert kept(lambda: ((x @ weight) + (x @ weight)).sum()) == x.nbytes
    assert kept(lambda: (x @ weight).exp().sum()) == x.nbytes + 10 * 30 * 4
    with torch.no_grad():
        assert kept(lambda: (x @ weight).exp().sum()) == 0


def test_a_wrong_gradient_has_no_row(record, monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return 1.01 * dy

    _break(monkeypatch, "mlp", "torch", Scaled.apply)
    contenders = [models.Contender.named(name) for name in ("reference", "plain torch")]
    models.measure_training(record, TINY, "fp32", CPU, contenders, seconds=0.1)
    assert {row["contender"] for row in record.rows} == {"reference"}
    assert "plain torch: gradient by the images" in record.data["failed"][0]


@pytest.mark.parametrize("package", ["timm", "transformers", "torchvision"])
def test_peers_compute_the_same(package):
    subject = models.Subject(TINY, "fp32", CPU)
    try:
        ready = models.prepare(models.Contender(package), subject)  # which checks its logits
    except peers.Missing as missing:
        pytest.skip(str(missing))
    with torch.no_grad():
        assert subject.check(lambda images: ready.run(images) * 1.01, ready.raw) is not None


@pytest.mark.parametrize("source", ["onnxruntime", "openvino"])
def test_runtimes_compute_the_same(source):
    pytest.importorskip(source)
    subject = models.Subject(TINY, "fp32", CPU)
    assert models.prepare(models.Contender(source), subject).run(subject.images(0, TINY.batch)).shape == (2, models.CLASSES)


def test_a_package_that_is_not_there_is_left_out(record, monkeypatch):
    def not_there(package):
        raise peers.Missing(f"{package} is not installed")

    monkeypatch.setattr(peers, "imported", not_there)
    models.measure(record, TINY, "fp32", CPU, [models.Contender("reference"), models.Contender("timm")], seconds=0.05)
    assert {row["contender"] for row in record.rows} == {"reference"} and record.data["failed"] == []
    assert record.data["skipped"] == ["model Ti/16@32 b2 fp32 timm: timm is not installed"]


@pytest.mark.parametrize("name", [c.name for c in (*models.ON_CPU, *models.ON_GPU, *models.TRAINING)])
def test_contenders_names_say_what_they_are(name):
    contender = models.Contender.named(name)
    assert contender.name == name and contender.mode in ("", *models.MODES) and contender.pinned in ("", *operations.PINNED)


def test_overhead(record):
    overhead.measure(record, "layer_norm", "fp32", CPU, seconds=0.02)
    found = {(row["direction"], row["contender"]): row for row in record.rows}
    assert {("inference", "stock"), ("inference", "auto"), ("recording", "stock"), ("recording", "auto")} <= set(found)
    assert 0 < found["inference", "auto"]["ms"] < 5  # of a single call


# ---- The record -----------------------------------------------------------------------------------------------------

TIMED = timing.Timing(2.0, 1.9, 2.2, 9, "turns")


def _row(record, contender="torch", **more):
    return record.row(
        TIMED, group="operation", op="mlp", shape="s", dtype="fp32", direction="forward", contender=contender, **more
    )


def test_a_row_replaces_an_older_one_about_the_same(record):
    _row(record, gb_s=1.0)
    _row(record, "cpp")
    _row(record, gb_s=2.0)
    assert [row["contender"] for row in record.rows] == ["cpp", "torch"] and record.rows[1]["gb_s"] == 2.0
    assert read(record.path)["rows"] == record.rows
    assert len({key_of(row) for row in record.rows}) == 2


def _tasks(done, record, failing=()):
    def run(name):
        if name in failing:
            raise ValueError(f"{name} is broken")
        done.append(name)
        _row(record, name)

    return [suite.Task(name, 1.0, lambda name=name: run(name)) for name in "abc"]


def test_a_resumed_run_does_only_what_is_left(tmp_path):
    path = tmp_path / "rows.json"
    first, second = [], []
    record = Record(path, dict(ENVIRONMENT), say=lambda text: None)
    for task, _, _ in suite.carry_out(record, _tasks(first, record), CPU):
        if task.name == "c":
            break  # as an interrupt does
    assert first == ["a", "b"]
    again = Record.resumed(path, dict(ENVIRONMENT), say=lambda text: None)
    list(suite.carry_out(again, _tasks(second, again), CPU))
    assert second == ["c"] and [row["contender"] for row in again.rows] == ["a", "b", "c"]


def test_a_resumed_run_keeps_the_ceilings_of_other_dtypes(tmp_path):
    path = tmp_path / "rows.json"
    Record(path, dict(ENVIRONMENT), say=print).ceilings(timing.Ceilings(0.04, {"fp32": 0.5, "fp16": 0.6}))
    Record.resumed(path, dict(ENVIRONMENT), say=print).ceilings(timing.Ceilings(0.05, {"bf16": 1.0, "fp16": 0.7}))
    products = {"fp32": 0.5, "fp16": 0.7, "bf16": 1.0}
    assert read(path)["ceilings"] == {"copy_tb_s": 0.05, "products_tflop_s": products}


def test_another_machine_can_not_resume(tmp_path):
    Record(tmp_path / "rows.json", dict(ENVIRONMENT), say=lambda text: None)
    with pytest.raises(CommandError, match="was begun with torch 2, this is 3"):
        Record.resumed(tmp_path / "rows.json", ENVIRONMENT | {"torch": "3"})


def test_a_broken_task_does_not_lose_the_others(record):
    done = []
    list(suite.carry_out(record, _tasks(done, record, failing="b"), CPU))
    assert done == ["a", "c"] and record.data["failed"] == ["b: ValueError: b is broken"]
    assert record.data["done"] == ["a", "c"]


def test_out_of_time(tmp_path):
    done = []
    record = Record(tmp_path / "rows.json", dict(ENVIRONMENT), minutes=1 / 60, say=lambda text: None)
    list(suite.carry_out(record, _tasks(done, record), CPU))
    assert done == [] and len(record.data["skipped"]) == 3 and "out of time" in record.data["skipped"][0]


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "is not JSON"),
        ("[]", "is not a file of vit-fast bench"),
        (json.dumps({"rows": [], "environment": {}, "format": 1}), "has format 1"),
        (json.dumps({"rows": [{"ms": 1}], "environment": {}, "format": 2}), "it is damaged"),
    ],
)
def test_files_that_are_none(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CommandError, match=told):
        read(tmp_path / "x.json")
    with pytest.raises(CommandError, match="no such file"):
        read(tmp_path / "y.json")
