"""What was measured decides: tables round trip, stale and damaged ones are left alone, `auto` obeys."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings

import pytest
import torch

import vit_fast
from vit_fast import backends, ops, tuning
from vit_fast.backends import OPERATIONS, Implementation
from vit_fast.benchmarks import cases
from vit_fast.tuning import Choice

CPU = torch.device("cpu")
DATE = "2026-01-02T03:04:05Z"
X = torch.randn(3, 5, 32)
LAYER_NORM = (X, torch.ones(32), torch.zeros(32), 1e-6, None)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_FAST_TUNING", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "tables")
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def choice_for(op, arguments, taken, ms=None):
    name, dtype, recording, size, rest = tuning.key_of(op, arguments)
    return Choice(name, str(dtype).removeprefix("torch."), recording, size, rest, taken, ms or {"torch": 2.0, taken: 1.0})


def keep(*choices):
    path = tuning.write(CPU, choices, [], DATE)
    tuning.forget()
    return path


# ---- What a choice is for -------------------------------------------------------------------------------------------


def test_calls_of_one_class_share_an_answer():
    weight, bias = torch.empty(64, 32), torch.empty(64)

    def key(rows, **more):
        arguments = {"activation": None, "residual": None} | more
        return tuning.key_of("linear", (torch.empty(rows, 32), weight, bias, *arguments.values()))

    assert key(197) == key(256) != key(257)
    assert key(197) != key(197, activation="gelu") and key(197) != key(197, residual=torch.empty(197, 64))


def test_gradients_and_autocast_have_answers_of_their_own():
    x = torch.empty(4, 32, requires_grad=True)
    arguments = (x, torch.empty(64, 32), None, None, None)
    recording = tuning.key_of("linear", arguments)
    with torch.no_grad():
        assert tuning.key_of("linear", arguments) != recording
    with torch.autocast("cpu", torch.bfloat16):
        assert tuning.key_of("linear", arguments)[1] == torch.bfloat16
        assert tuning.key_of("layer_norm", LAYER_NORM)[1] == torch.float32


@pytest.mark.parametrize("op", cases.OPS)
def test_every_operation_has_classes(op):
    small = cases.Shape(model="tiny", image=32, batch=2, patch=16, width=32, hidden=64, heads=2, layers=1)
    keys = [tuning.key_of(op, case.arguments(cases.Maker("meta", torch.float32))) for case in cases.cases_of(op, small)]
    assert all(key[0] == op and isinstance(hash(key), int) for key in keys)
    json.dumps([key[4] for key in keys])


def test_a_size_that_nobody_timed_takes_the_nearest():
    def choice(size, taken):
        return Choice("layer_norm", "float32", False, size, (32, False), taken, {})

    names = tuning.Table.of("x", [choice(1, "cpp"), choice(4, "torch")]).names
    found = [names["layer_norm", torch.float32, False, size, (32, False)] for size in range(tuning.SIZES)]
    assert found == ["cpp", "cpp", "cpp", "torch", "torch"]


# ---- Tables ---------------------------------------------------------------------------------------------------------


def test_round_trip(folder):
    assert tuning.choice("layer_norm", LAYER_NORM) is None
    path = keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    assert path.parent == folder and [p.name for p in folder.iterdir() if p.suffix != ".lock"] == [path.name]
    assert tuning.choice("layer_norm", LAYER_NORM) == "cpp"
    assert tuning.choice("layer_norm", (X.double(), *LAYER_NORM[1:])) is None
    assert tuning.load("cpu").source == "vit-fast tune, 2026-01-02"
    # Another run adds to it, and has the last word on what it timed again.
    other = (X, *LAYER_NORM[1:4], X)
    keep(choice_for("layer_norm", LAYER_NORM, "torch"), choice_for("layer_norm", other, "cpp"))
    assert [tuning.choice("layer_norm", a) for a in (LAYER_NORM, other)] == ["torch", "cpp"]
    assert tuning.notices == []


def test_the_number_of_threads_is_part_of_the_machine():
    keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tuning.choice("layer_norm", LAYER_NORM) is None
    finally:
        torch.set_num_threads(threads)
    assert tuning.choice("layer_norm", LAYER_NORM) == "cpp"


@pytest.mark.parametrize("name", ["vit_fast", "torch", "triton"])
def test_a_table_of_other_versions_is_left_alone(name):
    path = keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    content = json.loads(path.read_text())
    content["versions"][name] = "0.0.1"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"was tuned with {name} 0.0.1, now .*vit-fast tune measures again"):
        assert tuning.choice("layer_norm", LAYER_NORM) is None
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert tuning.choice("layer_norm", LAYER_NORM) is None
    keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    assert tuning.choice("layer_norm", LAYER_NORM) == "cpp" and len(json.loads(path.read_text())["choices"]) == 1


def _without(name):
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "not JSON {",
        lambda content: "",
        lambda content: [1, 2],
        lambda content: content | {"choices": 3},
        lambda content: content | {"choices": [{"op": "layer_norm"}]},
        lambda content: content | {"choices": [content["choices"][0] | {"dtype": "float31"}]},
        lambda content: content | {"choices": [content["choices"][0] | {"op": "softmax"}]},
        lambda content: content | {"choices": [content["choices"][0] | {"size": "large"}]},
        lambda content: content | {"choices": [content["choices"][0] | {"rest": [[1], {}]}]},
        lambda content: content | {"launches": [{"function": 3, "arguments": [], "config": {}}]},
        lambda content: content | {"versions": None},
        lambda content: content | {"date": 7},
        _without("identity"),
        _without("date"),
        _without("choices"),
    ],
)
def test_a_damaged_table_is_left_alone(change):
    path = keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match="is damaged: it is not used"):
        assert tuning.choice("layer_norm", LAYER_NORM) is None
    torch.testing.assert_close(ops.layer_norm(*LAYER_NORM), torch.nn.functional.layer_norm(X, (32,), *LAYER_NORM[1:4]))
    keep(choice_for("layer_norm", LAYER_NORM, "cpp"))  # and written anew
    assert tuning.choice("layer_norm", LAYER_NORM) == "cpp"


def test_a_table_of_another_format():
    path = keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.warns(UserWarning, match="has format 99, this version reads 1"):
        assert tuning.choice("layer_norm", LAYER_NORM) is None


def _write_many(number):
    for size in range(tuning.SIZES):
        tuning.write(CPU, [Choice("layer_norm", "float32", False, size, (number, False), "cpp", {"torch": 1.0})], [], DATE)


def test_processes_that_write_at_once(folder):
    """Nothing is lost, and whoever reads meanwhile finds a whole file."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(number,)) for number in (1, 2, 3)]
    for process in writers:
        process.start()
    reads = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(process.is_alive() for process in writers):
            tuning.load(CPU)
            reads += 1
    assert all(process.exitcode == 0 for process in writers) and reads > 0
    found = {(c.size, c.rest) for c in tuning.load(CPU).choices}
    assert found == {(size, (number, False)) for size in range(tuning.SIZES) for number in (1, 2, 3)}
    assert len([p for p in folder.iterdir() if p.suffix == ".json"]) == 1 and not list(folder.glob("*json?*"))


def test_off(monkeypatch):
    keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    monkeypatch.setenv("VIT_FAST_TUNING", "off")
    assert tuning.choice("layer_norm", LAYER_NORM) is None
    with pytest.raises(OSError, match="off"):
        tuning.write(CPU, [], [], DATE)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_FAST_TUNING")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "vit_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / ".cache" / "vit_fast"


def test_shipped_tables_serve_the_devices_that_they_were_made_on(tmp_path):
    (tmp_path / "tables").mkdir()
    choices = [choice_for("layer_norm", LAYER_NORM, "cpp")]
    here = tuning.identity_of(CPU)
    tuning.write_file(tmp_path / "tables" / "other.json", here | {"name": "another"}, {}, DATE, choices)
    assert tuning.choice("layer_norm", LAYER_NORM) is None
    tuning.forget()
    tuning.write_file(tmp_path / "tables" / "this.json", here, {}, DATE, choices)
    assert tuning.choice("layer_norm", LAYER_NORM) == "cpp" and tuning.load("cpu").source == "shipped, measured 2026-01-02"
    keep(choice_for("layer_norm", LAYER_NORM, "torch"))  # this machine's own measurements come first
    assert tuning.choice("layer_norm", LAYER_NORM) == "torch"


def test_shipped_tables_are_whole():
    for path in (tuning.Path(tuning.__file__).with_name("tables")).glob("*.json"):
        assert tuning._content(path)["choices"], path
        assert tuning.file_name(tuning._content(path)["identity"]) == path.name


# ---- auto obeys -----------------------------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch):
    """layer_norm says who computed it."""
    operation = OPERATIONS["layer_norm"]
    for name in ("torch", "cpp"):
        supports = (lambda x, *rest: "only small ones" if x.shape[0] > 3 else None) if name == "cpp" else backends.anything
        implementation = Implementation(lambda *arguments, name=name: name, supports)
        monkeypatch.setitem(operation.implementations, name, implementation)
    return operation


def test_auto_takes_what_was_measured_fastest(named):
    assert named(*LAYER_NORM) == "cpp"  # the operation's order
    keep(choice_for("layer_norm", LAYER_NORM, "torch"))
    assert named(*LAYER_NORM) == "torch"
    with vit_fast.use("cpp"):  # whoever asks for one by name gets it
        assert named(*LAYER_NORM) == "cpp"


def test_what_was_measured_but_can_not_run_gives_way(named):
    large = (X.new_ones(4, 5, 32), *LAYER_NORM[1:])
    keep(choice_for("layer_norm", large, "cpp"))
    assert named(*large) == "torch"
    keep(choice_for("layer_norm", large, "gone"))
    assert named(*LAYER_NORM) == "cpp"


def test_a_compiled_model_on_a_cpu_takes_what_the_compiler_fuses():
    keep(choice_for("layer_norm", LAYER_NORM, "cpp"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(lambda x: ops.layer_norm(x, *LAYER_NORM[1:]), backend=backend, fullgraph=True)(X)
    assert "functional.layer_norm" in graphs[0] and "vit_fast_cpp" not in graphs[0]


def test_import_reads_nothing(folder):
    folder.mkdir()
    (folder / tuning.file_name(tuning.identity_of(CPU))).write_text("damaged")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import vit_fast"], env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""


# ---- Launches of kernels --------------------------------------------------------------------------------------------


def test_a_launch_that_was_measured_is_taken():
    from vit_fast import kernels
    from vit_fast.kernels import layer_norm
    from vit_fast.kernels.common import TARGETS, launch_arguments

    target = TARGETS[90]
    default = layer_norm.forward_config(1000, 768, target)
    other = [2, 1024, 8]
    assert list(default) != other
    row = {"function": "layer_norm.forward_config", "arguments": list(launch_arguments((1000, 768, target))), "config": other}
    (row,) = json.loads(json.dumps([row]))  # as a file gives it
    try:
        kernels.launches[(row["function"], *row["arguments"])] = row["config"]
        assert layer_norm.forward_config(1000, 768, target) == tuple(other)
        assert layer_norm.forward_config(1001, 768, target) == default
    finally:
        kernels.launches.clear()
    assert layer_norm.forward_config(1000, 768, target) == default


# ---- From times to choices ------------------------------------------------------------------------------------------


def _row(contender, direction, ms, op="layer_norm", variant=""):
    labels = {"group": "operation", "op": op, "variant": variant, "shape": "B/16@224 b1", "dtype": "fp32"}
    return labels | {"contender": contender, "direction": direction, "ms": ms}


def test_the_fastest_is_chosen_for_inference_and_for_training():
    rows = [_row("torch", "forward", 1.0), _row("cpp", "forward", 0.5), _row("torch", "backward", 1.0)]
    rows += [_row("cpp", "backward", 2.0), _row("reference", "forward", 0.1), _row("reference", "backward", 0.1)]
    found = {choice.recording: choice for choice in tuning.choices_from(rows)}
    assert found[False].taken == "cpp" and found[True].taken == "torch"
    assert found[True].ms == {"torch": 2.0, "cpp": 2.5}
    shape = cases.shape_of("B", batch=1)
    arguments = cases.find("layer_norm", "", shape).arguments(cases.Maker("meta", torch.float32))
    assert found[True].key == tuning.key_of("layer_norm", arguments)


def test_what_is_no_faster_than_noise_is_not_chosen():
    rows = [_row("torch", "forward", 1.0), _row("cpp", "forward", 0.995)]
    assert [choice.taken for choice in tuning.choices_from(rows)] == ["torch"]


def test_what_lost_its_gradient_to_the_budget_is_not_chosen_for_training():
    rows = [_row("torch", d, 1.0) for d in ("forward", "backward")] + [_row("cpp", "forward", 0.5)]
    assert [(c.recording, c.taken) for c in tuning.choices_from(rows)] == [(False, "cpp")]
