"""The programs under bench/: the cost model against hand arithmetic, the compile report, and the GPU programs' smoke runs.

Each program runs in a process of its own: they compile, where this process interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hardware import GPU

ROOT = Path(__file__).resolve().parents[1]
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


# ---- The cost model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, image, gflop", [("S", 224, 9.20), ("B", 224, 35.13), ("L", 224, 123.1), ("H", 224, 334.6), ("B", 384, 111.0)]
)
def test_model_flops_are_those_counted_by_hand(bench, model, image, gflop):
    import cases
    import roofline

    s = cases.shape_of(model, image, batch=1)
    counted = roofline.model_flops(s.tokens, s.width, s.layers, s.hidden, s.patch) / 1e9
    assert counted == pytest.approx(gflop, rel=1e-3)


def test_tokens(bench):
    import cases

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
def test_work_and_floors_are_those_counted_by_hand(bench, op, variant, direction, gflop, megabytes, floor_us):
    import cases
    import roofline

    work = cases.find(op, variant, cases.shape_of("B", 224, 128)).work(direction, 2)
    assert work.flops / 1e9 == pytest.approx(gflop, rel=5e-3)
    assert work.bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)
    assert roofline.CEILINGS[90].floor_us(work, "bf16") == pytest.approx(floor_us, rel=5e-3)


def test_every_case_builds_what_its_operation_takes(bench):
    import cases
    import torch

    from vit_fast.backends import OPERATIONS

    shape = cases.Shape("tiny", image=32, batch=2, patch=16, width=32, hidden=64, heads=2, layers=1)
    for op in cases.OPS:
        for case in cases.cases_of(op, shape):
            result = OPERATIONS[op].implementations["reference"].run(*case.arguments(cases.Maker("meta", torch.bfloat16)))
            first = result if isinstance(result, torch.Tensor) else result[0]
            assert first.shape[:2] == (2, 5), case.name
            assert case.work("backward", 2).bytes > 0


# ---- The compile report ---------------------------------------------------------------------------------------------

KERNELS = """
import sys
sys.path.insert(0, {bench!r})
import compile_report as report
import compiling
import torch, triton, triton.language as tl
from roofline import Work

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


# ---- The GPU programs -----------------------------------------------------------------------------------------------


def test_gpu_smoke(tmp_path):
    done = run(BENCH / "gpu.py", "--smoke", "--out", "results", cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results" / "cpu-smoke").iterdir()
    data = json.loads(file.read_text())
    assert data["failed"] == [] and data["environment"]["smoke"] and data["environment"]["torch"]
    rows = data["rows"]
    assert {row["op"] for row in rows} == {"attention", "linear", "mlp", "layer_norm", "patch_embed", "model"}
    assert {"torch", "triton"} <= {row["implementation"] for row in rows if row["op"] == "layer_norm"}
    for row in rows:
        assert row["ms"] > 0 and row["p20"] <= row["ms"] <= row["p80"]
        assert row["op"] == "model" or (row["checked"] and row["floor_ms"] > 0)
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


@pytest.mark.parametrize("program", ["gpu.py", "tune.py"])
def test_without_a_gpu_they_say_so(program, tmp_path):
    done = run(BENCH / program, cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_tune_smoke(tmp_path):
    done = run(BENCH / "tune.py", "--smoke", "--ops", "layer_norm", "--json", "rows.json", cwd=tmp_path, hide_gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert all(row["tried"] == 2 and row["refused"] == 0 and row["wrong"] == 0 for row in rows)


def test_what_lost_to_torch(bench):
    import gpu

    def row(implementation, ms, op="attention"):
        labels = {"op": op, "variant": "", "direction": "forward", "shape": "B/16@224 b128", "dtype": "bf16"}
        return labels | {"implementation": implementation, "ms": ms}

    rows = [
        row("torch", 1.2),
        row("torch+cudnn", 1.0),
        row("triton", 1.1),
        row("torch", 1.0, "mlp"),
        row("triton", 1.01, "mlp"),
    ]
    (told,) = gpu.lost(rows)
    assert told.startswith("attention forward B/16@224 b128 bf16: triton") and "torch+cudnn" in told and "1.10 times" in told


@pytest.mark.skipif(not GPU, reason="needs a GPU: times are taken with device events and CUDA graphs")
def test_timing_on_a_gpu(bench):
    import timing
    import torch

    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    graphed = timing.graph(lambda: [lambda: x @ x, lambda: x + x], device)
    assert graphed.method == "graph" and 0 < graphed.p20 <= graphed.ms <= graphed.p80
    assert timing.events([lambda: x @ x], device).ms > timing.events([lambda: x + x], device).ms
