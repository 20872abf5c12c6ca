"""`vit-fast bench` and `vit-fast tune` as people call them."""

import json

import pytest
import torch
from bench_support import record, row

from vit_fast import ops, tuning
from vit_fast.benchmarks import suite
from vit_fast.cli import main

QUICK = ["--models", "Ti", "--image", "32", "--batch", "1", "--seconds", "0.02"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_FAST_TUNING", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def run(capsys):
    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return call


def test_bench(run, here):
    options = [
        *QUICK,
        "--contenders",
        "reference,plain,freeze,torch,cpp",
        "--ops",
        "layer_norm",
        "--json",
        "a.json",
        "--html",
        "a.html",
    ]
    code, out, err = run("bench", *options)
    assert code == 0, err
    data = json.loads((here / "a.json").read_text())
    assert data["failed"] == [] and {r["group"] for r in data["rows"]} == {"operation", "model", "overhead"}
    found = {r["contender"] for r in data["rows"] if r["group"] == "model" and r["direction"] == "forward"}
    assert found == {"reference", "plain", "freeze()"}
    assert {r["contender"] for r in data["rows"] if r["direction"] == "training step"} == {"reference", "plain"}
    assert "ceilings: a copy" in out and (here / "a.html").read_text().startswith("<!doctype html>")
    assert "about" in err and "left" in err
    last = out[out.index("How many times as fast") :].splitlines()
    assert last[0].startswith("How many times as fast as the reference") and any("freeze()" in line for line in last)
    # A finished run is not run again.
    code, out, err = run("bench", *options, "--resume")
    assert code == 0 and " left · " not in err and json.loads((here / "a.json").read_text())["rows"] == data["rows"]


def test_interrupted_and_resumed(run, here, monkeypatch):
    carry_out = suite.carry_out

    def interrupted(record, tasks, device):
        for i, task in enumerate(carry_out(record, tasks, device)):
            if i == 1:
                raise KeyboardInterrupt
            yield task

    options = [*QUICK, "--parts", "overhead", "--ops", "layer_norm,linear", "--json", "a.json"]
    monkeypatch.setattr(suite, "carry_out", interrupted)
    code, out, err = run("bench", *options)
    assert code == 130 and "--resume goes on" in err
    first = json.loads((here / "a.json").read_text())["rows"]
    assert {r["op"] for r in first} == {"layer_norm"}
    monkeypatch.setattr(suite, "carry_out", carry_out)
    code, out, err = run("bench", *options, "--resume")
    rows = json.loads((here / "a.json").read_text())["rows"]
    assert code == 0 and rows[: len(first)] == first and {r["op"] for r in rows} == {"layer_norm", "linear"}


def test_compare(run, here):
    (here / "a.json").write_text(json.dumps(record([row("cpp", 1.0)])))
    (here / "b.json").write_text(json.dumps(record([row("cpp", 0.5)])))
    code, out, err = run("bench", "--compare", "a.json", "b.json")
    assert code == 0 and "1 faster beyond the noise" in out and "2.00x" in out


@pytest.mark.parametrize(
    "options, told",
    [
        (["--models", "XXL"], "'XXL' is not one of"),
        (["--batch", "0"], "whole numbers from 1 on"),
        (["--image", "225"], "is a multiple of 16 pixels"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--contenders", "jax"], "there is no 'jax'"),
        (["--minutes", "-1"], "a number above 0"),
        (["--json", "no/such/folder/a.json"], "there is no folder no/such/folder"),
        (["--json", "missing.json", "--resume"], "no file missing.json"),
        (["--parts", "ops", "--ops", "none"], "nothing is left to measure"),
        (["--device", "meta"], "meta"),
        (["--compare", "a.json", "b.json"], "no such file: a.json"),
    ],
)
def test_what_bench_refuses(run, options, told):
    code, out, err = run("bench", *options)
    assert code == 2 and told in err and err.startswith("vit-fast") and err.count("\n") == 1, err


def test_tune(run, here):
    code, out, err = run("tune", *QUICK, "--ops", "layer_norm,mlp", "--dtype", "float32")
    assert code == 0, err
    (path,) = (here / "cache").glob("*.json")
    content = tuning._content(path)
    compared = {(c.op, c.recording) for c in content["choices"]}
    if not compared:  # without the extension there is only stock PyTorch
        assert "only stock PyTorch could run these" in err
        return
    assert compared == {(op, recording) for op in ("layer_norm", "mlp") for recording in (False, True)}
    for choice in content["choices"]:
        fastest = min(choice.ms, key=choice.ms.get)
        assert choice.taken in (fastest, "torch") and choice.ms[choice.taken] < 1.02 * choice.ms[fastest]
    assert str(path) in out and "written" in out
    x = torch.randn(1, 5, 192)
    arguments = (x, torch.ones(192), torch.zeros(192), 1e-6, None)
    assert tuning.choice("layer_norm", arguments) in ("torch", "cpp")
    torch.testing.assert_close(ops.layer_norm(*arguments), torch.nn.functional.layer_norm(x, (192,), *arguments[1:3], 1e-6))
    # info says where choices come from.
    code, out, err = run("info")
    assert code == 0 and "vit-fast tune, " in out and str(here / "cache") in out


def test_tune_leaves_out_what_is_wrong(run, here, monkeypatch):
    from vit_fast import backends

    operation = backends.OPERATIONS["layer_norm"]
    run_reference = operation.implementations["reference"].run

    def wrong(*arguments):
        result = run_reference(*arguments)
        return result * 1.01 if isinstance(result, torch.Tensor) else (result[0] * 1.01, result[1])

    broken = backends.Implementation(wrong, backends.anything)
    monkeypatch.setitem(operation.implementations, "cpp", broken)
    code, out, err = run("tune", *QUICK, "--ops", "layer_norm", "--dtype", "float32")
    assert code == 1 and "over the error budget" in err
    (path,) = (here / "cache").glob("*.json")
    assert all("cpp" not in choice.ms for choice in tuning._content(path)["choices"])


@pytest.mark.parametrize(
    "options, told",
    [(["--launches"], "--launches is for the Triton kernels on a GPU"), (["--ops", "none"], "nothing is left to time")],
)
def test_what_tune_refuses(run, options, told):
    if torch.cuda.is_available() and "--launches" in options:
        pytest.skip("there is a GPU")
    code, out, err = run("tune", *options)
    assert code == 2 and told in err and err.count("\n") == 1


def test_tune_says_when_tables_are_off(run, monkeypatch):
    monkeypatch.setenv("VIT_FAST_TUNING", "off")
    code, out, err = run("tune", *QUICK)
    assert code == 2 and "VIT_FAST_TUNING is off" in err


def test_a_cache_that_can_not_be_written(run, here, monkeypatch):
    (here / "file").write_text("")
    monkeypatch.setenv("VIT_FAST_TUNING", str(here / "file" / "cache"))
    code, out, err = run("tune", *QUICK, "--ops", "layer_norm", "--dtype", "float32")
    assert code == 2 and "can't be written" in err and "VIT_FAST_TUNING names another" in err
