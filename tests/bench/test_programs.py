"""The programs under bench/: the compile report, and the smoke run of the GPU's.

Each program runs in a process of its own: they compile, where this process interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hardware import GPU

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def run(*command, cwd, hide_gpu=False):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VIT_FAST_IMPL")}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def bench(monkeypatch):
    """bench/ on the path, and none of its modules left behind: their names are short."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCH:
            del sys.modules[name]


# ---- The compile report ---------------------------------------------------------------------------------------------

KERNELS = """
import sys
sys.path.insert(0, {bench!r})
import compile_report as report
import compiling
import torch, triton, triton.language as tl
from vit_fast.benchmarks.roofline import Work

@triton.jit
def _product_kernel(x_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * K + k[None, :])
    tl.store(x_ptr + m[:, None] * K + k[None, :], tl.dot(x, y).to(x.dtype))

@triton.jit
def _normalise_kernel(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N)).to(tl.float32)
    tl.store(x_ptr + tl.arange(0, N), x / tl.sum(x, 0))

x = torch.empty(1 << 16, device="meta", dtype=torch.bfloat16)
launches = {{
    "good": lambda: _product_kernel[(7, 3)](x, x, M=64, K=64),
    "oversized": lambda: _product_kernel[(1,)](x, x, M=256, K=256, num_warps=8),
    "spilling": lambda: _normalise_kernel[lambda meta: (meta["N"] // 1024,)](x, N=65536, num_warps=4),
    "without wgmma": lambda: _product_kernel[(1,)](x, x, M=16, K=64),
}}
rows = []
for name, launch in launches.items():
    with compiling.compiling_for(90) as found:
        launch()
    labels = dict(op=name, variant="", shape="-", dtype="bf16", direction="forward", hot=True)
    rows.append(report.row_of(found[0], 90, Work(1e9, 1e6), **labels))
assert report.finish(rows[:1]) == 0
sys.exit(report.finish(rows, json_file="report.json"))
"""


def test_the_compile_report_judges_kernels(tmp_path):
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS.format(bench=str(BENCH)))
    done = run(script, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    good, oversized, spilling, without = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert good["registers"] > 0 and good["instructions"]["wgmma"] > 0 and good["resident"] > 1
    assert good["problems"] == [] and good["programs"] == 21
    assert good["floor_us"] == pytest.approx(1e9 / 798e12 * 1e6)
    assert oversized["shared_bytes"] > 227 * 1024 and "shared memory" in oversized["problems"][0]
    assert spilling["spilled_bytes"] > 0 and "spills" in spilling["problems"][0] and spilling["programs"] == 64
    assert without["instructions"]["mma.sync"] > 0 and "without wgmma" in without["problems"][0]
    last = done.stdout.partition("not acceptable:")[2]
    assert all(name in last for name in ("oversized", "spilling", "without wgmma")) and "good" not in last


def test_the_compile_report_drives_the_real_operations(tmp_path):
    options = "--ops layer_norm --targets sm_90 --models B --images 224 --dtypes bf16 --jobs 1 --json report.json"
    done = run(BENCH / "compile_report.py", *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["direction"] for row in rows} == {"forward", "training forward", "backward"}
    assert {row["shape"] for row in rows} == {"B/16@224 b128", "B/16@224 b1"}
    assert all(row["registers"] > 0 and row["resident"] > 0 and row["problems"] == [] for row in rows)
    assert "not acceptable" in done.stdout.splitlines()[-1]


def test_resident_programs(bench):
    import compiling

    assert compiling.resident_programs(90, registers=255, shared=61 * 1024, warps=4) == 2  # registers: 2 · 4 · 32 · 256 = 65536
    assert compiling.resident_programs(90, registers=32, shared=100 * 1024, warps=4) == 2  # shared memory: 228 KB
    assert compiling.resident_programs(86, registers=32, shared=0, warps=8) == 6  # 48 warps
    assert compiling.resident_programs(80, registers=32, shared=0, warps=1) == 32  # programs
    assert compiling.resident_programs(100, registers=64, shared=0, warps=4, tensor_columns=256) == 2
    assert compiling.resident_programs("gfx942", registers=128, shared=0, warps=4) == 4  # 512 a lane, four SIMDs
    assert compiling.resident_programs(90, registers=64, shared=230 * 1024, warps=4) == 0


@pytest.mark.parametrize(
    "option", ["--targets sm_75", "--ops softmax", "--models XL", "--dtypes int8", "--images 100", "--jobs 0"]
)
def test_the_compile_report_refuses_wrong_values(bench, option, capsys):
    import compile_report

    with pytest.raises(SystemExit) as ended:
        compile_report.main(option.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and option.split()[0] in told


# ---- The GPU's ------------------------------------------------------------------------------------------------------


def test_gpu_smoke(tmp_path):
    done = run(BENCH / "gpu.py", "--smoke", "--out", "results", cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results" / "cpu-smoke").iterdir()
    data = json.loads(file.read_text())
    assert data["failed"] == [] and data["environment"]["smoke"] and data["environment"]["torch"]
    rows = data["rows"]
    assert {row["op"] for row in rows} == {"attention", "linear", "mlp", "layer_norm", "patch_embed", "model"}
    assert {"torch", "triton"} <= {row["contender"] for row in rows if row["op"] == "layer_norm"}
    assert {"freeze()", "plain", "plain torch"} <= {row["contender"] for row in rows if row["direction"] == "forward"}
    assert {"plain", "plain torch"} == {row["contender"] for row in rows if row["direction"] == "training step"}
    for row in rows:
        assert row["ms"] > 0 and row["p20"] <= row["ms"] <= row["p80"]
        assert row["checked"] and row["floor_ms"] > 0
    assert done.stdout.rstrip().endswith("failed: 0")


def test_gpu_fails_where_a_test_fails(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    options = ["--smoke", "--parts", "tests", "--tests", tmp_path / "test_it.py", "--out", "results"]
    done = run(BENCH / "gpu.py", *options, cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_it.py::test_bad" in done.stdout.splitlines()[-1]
    (file,) = (tmp_path / "results" / "cpu-smoke").iterdir()
    (outcome,) = json.loads(file.read_text())["tests"]
    assert (outcome["passed"], outcome["failed"]) == (1, 1) and "assert 1 == 2" in outcome["output"]


def test_every_test_file_that_the_gpu_runs_exists(bench):
    from gpu_tests import TESTS

    assert [file for file in TESTS if not (ROOT / file).is_file()] == []


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(BENCH / "gpu.py", cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


LAUNCHES = """
import json
import torch
from vit_fast.benchmarks import cases, launches
shape = cases.Shape(model="tiny", image=32, batch=2, patch=16, width=32, hidden=64, heads=2, layers=1)
case = cases.find("layer_norm", "", shape)
rows = launches.tune_case(case, "fp32", torch.device("cpu"), most=2, say=lambda text: None)
print(json.dumps(rows))
"""


def test_other_launches_are_tried(tmp_path):
    """In the interpreter, where their times mean nothing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["function"] for row in rows} == {"layer_norm.forward_config", "layer_norm.backward_config"}
    for row in rows:
        assert (row["tried"], row["refused"], row["wrong"]) == (2, 0, 0) and row["arguments"][:2] == [10, 32]
        assert row["config"] is None or (isinstance(row["config"], list) and row["best_ms"] < row["default_ms"])


@pytest.mark.skipif(not GPU, reason="needs a GPU: times are taken with device events and CUDA graphs")
def test_timing_on_a_gpu():
    import torch

    from vit_fast.benchmarks import timing

    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    graphed = timing.graph(lambda: [lambda: x @ x, lambda: x + x], device)
    assert graphed.method == "graph" and 0 < graphed.p20 <= graphed.ms <= graphed.p80
    assert timing.events([lambda: x @ x], device).ms > timing.events([lambda: x + x], device).ms
