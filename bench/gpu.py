#!/usr/bin/env python3
"""Everything a GPU can tell about vit_fast, in one run of less than nine minutes: tests, then times, in one JSON file.

    python bench/gpu.py [--out bench/results] [--minutes 8.5] [--parts tests,ops,models] [--smoke]

1. The tests of the operations and the model, at real shapes.
2. Every operation, forward and backward, in each implementation; attention also with SDPA pinned to cuDNN and to flash. Every
   result that is timed is first held against the float64 reference within the project's error budget.
3. Whole models: forward and training step; timm's, eager and compiled, where it is installed.

The file is OUT/<device>/<date>-<commit>.json and is written after every measurement: a run that is cut short keeps what it has.
Times are medians of device-event timings over rotated buffers of random data; ceilings are measured in the same run. The last
lines say what failed and what lost to stock PyTorch. Exit code 1 if a test or a check failed, 2 without a CUDA device.
--smoke runs everything but the tests at tiny shapes on the CPU, to try the program itself: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does when it is unset, less a warning
    if "--smoke" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import cases  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import vit_fast.ops  # noqa: E402, F401  (fills OPERATIONS)
from vit_fast import backends  # noqa: E402
from vit_fast.testing import error  # noqa: E402

_TESTED = ("attention", "linear", "layer_norm", "patch_embed", "extension_cuda", "modeling", "modules")
TESTS = [f"tests/test_{name}.py" for name in _TESTED]
PARTS = ("tests", "ops", "models")
LOST = 1.02  # slower than stock PyTorch by more than the noise

TINY = cases.Shape(model="tiny", image=32, batch=2, patch=16, width=32, hidden=64, heads=2, layers=1)
TIMM = {"S": "vit_small_patch16_224", "B": "vit_base_patch16_224", "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}


class OutOfTime(BaseException):
    """The budget is spent; what was measured is saved. Not an Exception: compilers wrap those in their own."""


# ---- The record -----------------------------------------------------------------------------------------------------


class Record:
    """The JSON file of a run."""

    def __init__(self, folder: Path, name: str, environment: dict, minutes: float):
        self._deadline = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.data = {"format": 1, "environment": environment, "ceilings": None}
        self.data |= {"tests": [], "rows": [], "skipped": [], "failed": []}
        self.save()

    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)

    def say(self, text: str) -> None:
        print(f"{self.seconds_left():5.0f}s left  {text}", flush=True)

    def skip(self, what: str) -> None:
        self.data["skipped"].append(what)
        self.save()
        self.say(f"skipped: {what}")

    def fail(self, what: str) -> None:
        self.data["failed"].append(what)
        self.save()
        self.say(f"FAILED: {what}")

    def row(self, timed: timing.Timing, **labels) -> None:
        row = {**labels, **{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(timed).items()}}
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        self.data["rows"].append(row)
        self.save()
        fraction = f"{100 * row['of_ceiling']:.0f} % of the ceiling" if "of_ceiling" in row else ""
        rate = f"{row['images_per_s']:,.0f} img/s" if "images_per_s" in row else ""
        names = (row["op"], row["variant"], row["direction"], row["shape"], row["dtype"], row["implementation"])
        self.say(f"{' '.join(filter(None, names)):78s} {row['ms']:9.4f} ms  {fraction}{rate}")


def environment_of(device: torch.device, smoke: bool) -> dict:
    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status = output("git", "status", "--porcelain", "--untracked-files=no")
    found = {
        "smoke": smoke,
        "commit": output("git", "rev-parse", "--short=10", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": "cpu-smoke",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clocks = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": {clocks: output("nvidia-smi", f"--query-gpu={clocks}", "--format=csv,noheader", "--id=0")},
        }
    return found


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- 1. Tests -------------------------------------------------------------------------------------------------------


def run_tests(record: Record, files: list[str], seconds: float) -> None:
    """Each file in its own process: a fault on the device ends that process only. Several at a time where there is room."""
    cores = os.cpu_count() or 1
    roomy = not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] > 40 << 30
    at_a_time = max(1, min(len(files), cores // 2)) if roomy else 1
    record.say(f"tests: {len(files)} files, {at_a_time} at a time, at most {seconds:.0f} s")
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(at_a_time) as pool:
        for outcome in pool.map(lambda file: _run_test_file(file, deadline), files):
            record.data["tests"].append(outcome)
            counts = ", ".join(f"{outcome[k]} {k}" for k in ("passed", "failed", "skipped"))
            record.say(f"{outcome['file']}: {counts}, {outcome['end']} after {outcome['seconds']} s")
            for name in outcome["failures"]:
                record.fail(f"test {name}")
            if outcome["end"] != "finished" and not outcome["failures"]:
                record.fail(f"tests of {outcome['file']}: {outcome['end']}: {outcome['last_line']}")
            record.save()


_RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)


def _run_test_file(file: str, deadline: float) -> dict:
    start = time.monotonic()
    outcome = {"file": file, "passed": 0, "failed": 0, "skipped": 0, "failures": []}
    outcome |= {"seconds": 0, "end": "finished", "last_line": ""}
    if not (ROOT / file).exists():
        return outcome | {"end": "missing", "last_line": "no such file"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", str(ROOT / file)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=max(1.0, deadline - start),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        text, outcome["end"] = done.stdout, "finished" if done.returncode in (0, 1) else f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout or ""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        outcome["end"] = "did not finish in time"
    for name, result in _RESULT.findall(text):
        if result in ("FAILED", "ERROR"):
            outcome["failures"].append(name)
        outcome["passed"] += result in ("PASSED", "XPASS")
        outcome["failed"] += result in ("FAILED", "ERROR")
        outcome["skipped"] += result in ("SKIPPED", "XFAIL")
    outcome["failures"] = list(dict.fromkeys(outcome["failures"]))
    outcome["seconds"] = round(time.monotonic() - start)
    outcome["last_line"] = (text.strip().splitlines() or [""])[-1][:300]
    if outcome["failures"]:
        outcome["output"] = text[-6000:]
    return outcome


# ---- 2. Operations --------------------------------------------------------------------------------------------------


def contenders(case: cases.Case, arguments: tuple) -> dict[str, Callable | str]:
    """What can compute the case: a callable by name, or the reason why it can't."""
    found: dict[str, Callable | str] = {}
    for name, implementation in backends.OPERATIONS[case.op].implementations.items():
        if name != "reference":
            with backends.use(name):  # `auto` may leave out what is not worth it
                found[name] = implementation.supports(*arguments) or implementation.run
    if case.op == "attention" and arguments[0].is_cuda:
        stock = backends.OPERATIONS["attention"].implementations["torch"].run
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def pinned(*arguments, backend=backend):
                with sdpa_kernel(backend):
                    return stock(*arguments)

            found[f"torch+{name}"] = pinned
    return found


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if isinstance(t, torch.Tensor)]


def leaves(arguments: tuple) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def cotangents_for(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    make = cases.Maker(outputs[0].device, outputs[0].dtype, seed)
    return [make(*o.shape, grad=False, dtype=o.dtype) for o in outputs]


class Exact:
    """A case's results in float64 and in its own dtype by the reference, for the checks of all contenders."""

    def __init__(self, case: cases.Case, arguments: tuple):
        self._case = case
        # Attention has no parameters: images are independent, and all of them in float64 would not fit.
        self._alone = case.op == "attention"
        self._images = sorted({0, case.shape.batch // 2, case.shape.batch - 1})
        run = backends.OPERATIONS[case.op].implementations["reference"].run
        own, wide = (
            tuple(to(self._some(a).detach()).requires_grad_(a.requires_grad) if _floating(a) else a for a in arguments)
            for to in (torch.clone, torch.Tensor.double)
        )
        with torch.no_grad():
            outputs = tensors(run(*own))
        # Drawn for the whole batch, so that contenders, which compute it whole, get the same ones.
        whole = [torch.empty(case.shape.batch, *o.shape[1:], dtype=o.dtype, device=o.device) for o in outputs]
        self.cotangents = cotangents_for(whole, seed=1)
        given = [self._some(c) for c in self.cotangents]
        self._own, self._wide = self._results(run, own, given), self._results(run, wide, given)

    def _some(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self._images] if self._alone else tensor

    def _shown(self, tensor: torch.Tensor, whole: bool) -> torch.Tensor:
        """A few images of what has an image axis; parameters' gradients entirely."""
        has_images = tensor.dim() > 1 and tensor.shape[0] == self._case.shape.batch
        if self._alone:
            return tensor[self._images] if whole else tensor
        return tensor[self._images] if has_images and self._case.shape.batch > 3 else tensor

    def _results(self, run, arguments, cotangents, whole: bool = False) -> dict[str, list[torch.Tensor]]:
        outputs = tensors(run(*arguments))
        cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves(arguments), cotangents)
        return {
            "forward": [self._shown(o.detach(), whole) for o in outputs],
            "backward": [self._shown(g, whole) for g in gradients],
        }

    def check(self, run, arguments) -> list[str]:
        """What breaks the error budget: a line each."""
        found = self._results(run, arguments, self.cotangents, whole=True)
        broken = []
        for direction, results in found.items():
            for i, (actual, own, wide) in enumerate(zip(results, self._own[direction], self._wide[direction], strict=True)):
                e = error(actual, own, wide)
                if not e.ok:
                    broken.append(f"{direction}[{i}]: error {e.value:.3e} over the budget {e.budget:.3e}")
        return broken


def _floating(a) -> bool:
    return isinstance(a, torch.Tensor) and a.is_floating_point()


def run_case(record: Record, ceilings: timing.Ceilings, case: cases.Case, dtype: str, device: torch.device) -> None:
    torch_dtype = cases.DTYPES[dtype]
    work = {d: case.work(d, torch_dtype.itemsize) for d in ("forward", "backward")}
    arguments = [case.arguments(cases.Maker(device, torch_dtype, seed=0))]
    where = f"{case.name} {case.shape.label} {dtype}"
    exact = Exact(case, arguments[0])
    for seed in range(1, timing.copies_for(work["backward"].bytes, device)):
        arguments.append(case.arguments(cases.Maker(device, torch_dtype, seed)))
    for name, run in contenders(case, arguments[0]).items():
        if isinstance(run, str):
            record.skip(f"{where} {name}: {run}")
            continue
        try:
            broken = exact.check(run, arguments[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refused:  # such as a pinned SDPA that has no kernel for this head size
            told = f"{where} {name}: {type(refused).__name__}: {' '.join(str(refused).split())[:200]}"
            record.skip(told) if "+" in name else record.fail(told)
            continue
        for line in broken:
            record.fail(f"{where} {name} {line}")
        for direction, amount in work.items():

            def prepare(direction=direction, run=run):
                if direction == "forward":
                    return [lambda a=a: _without_gradients(run, a) for a in arguments]
                outputs = [tensors(run(*a)) for a in arguments]
                return [
                    lambda o=o, a=a: torch.autograd.grad(o, leaves(a), exact.cotangents, retain_graph=True)
                    for o, a in zip(outputs, arguments, strict=True)
                ]

            timed = timing.own_time(prepare, device)
            # What a single image costs when its launches are not in a graph.
            alone = {"eager_ms": timing.events(prepare(), device).ms} if case.shape.batch <= 8 else {}
            floor = ceilings.floor_ms(amount.flops, amount.bytes, dtype)
            record.row(
                timed, op=case.op, variant=case.variant, implementation=name, shape=case.shape.label, dtype=dtype,
                direction=direction, checked=not broken, tflop_s=amount.flops / timed.ms / 1e9,
                gb_s=amount.bytes / timed.ms / 1e6, floor_ms=floor, of_ceiling=floor / timed.ms, **alone,
            )  # fmt: skip


def _without_gradients(run, arguments):
    with torch.no_grad():
        return run(*arguments)


# ---- 3. Models ------------------------------------------------------------------------------------------------------


def run_model(record: Record, shape: cases.Shape, dtype: str, name: str, training: bool, device: torch.device) -> None:
    """A vit_fast model under ``use(name)``, its logits held against the float64 reference first.

    Without dropout, as timm's models are by default.
    """
    from vit_fast.configs import CONFIGS
    from vit_fast.modeling import VisionTransformer

    smoke = shape.model not in cases.MODELS
    config = copy.deepcopy(CONFIGS["testing" if smoke else cases.MODELS[shape.model]])
    config.transformer.dropout_rate = 0.0
    torch.manual_seed(0)
    model = VisionTransformer(config, shape.image, num_classes=1000, zero_head=False).to(device)
    label = f"model {shape.label} {dtype} {name}"
    if not training:
        few = torch.randn(2, 3, shape.image, shape.image, device=device).to(cases.DTYPES[dtype])
        narrow = copy.deepcopy(model).eval().to(cases.DTYPES[dtype])
        exact_model = copy.deepcopy(narrow).double()
        with torch.no_grad():
            with backends.use("reference"):
                own, exact = narrow(few)[0], exact_model(few.double())[0]
            with backends.use(name):
                e = error(narrow(few)[0], own, exact)
        if not e.ok:
            record.fail(f"{label}: logits: error {e.value:.3e} over the budget {e.budget:.3e}")
        del narrow, exact_model
    model = model.to(cases.DTYPES[dtype]).train(training)
    with backends.use(name):
        _time_network(record, model, lambda net, x, y: net(x, y), shape, dtype, name, training, device)


def run_timm(record: Record, shape: cases.Shape, dtype: str, compiled: bool, training: bool, device: torch.device) -> None:
    import timm

    torch._dynamo.reset()
    net = timm.create_model(TIMM[shape.model], img_size=shape.image).to(device, cases.DTYPES[dtype]).train(training)
    # In graphs where launches decide, else plain: compile's own graphs copy their inputs.
    mode = "reduce-overhead" if shape.batch <= 8 and not training else None
    net = torch.compile(net, mode=mode, dynamic=False) if compiled else net
    name = f"timm {'compiled' if compiled else 'eager'}"
    _time_network(record, net, lambda net, x, y: F.cross_entropy(net(x).float(), y), shape, dtype, name, training, device)


def _time_network(record, net, loss_of, shape, dtype, name, training, device) -> None:
    images = [torch.randn(shape.batch, 3, shape.image, shape.image, device=device).to(cases.DTYPES[dtype]) for _ in range(2)]
    extra = {}
    if training:
        labels = torch.randint(0, 1000, (shape.batch,), device=device)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=device.type == "cuda")

        def step(x):
            loss_of(net, x, labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:

        def step(x):
            with torch.inference_mode():
                return net(x)

    timed = timing.events([lambda x=x: step(x) for x in images], device, target_ms=700.0, most=300)
    if not training and shape.batch <= 8 and "compiled" not in name and device.type == "cuda":
        try:
            extra["graphed_ms"] = timing.graph(lambda: [lambda: step(images[0])], device).ms
        except RuntimeError as refused:
            record.skip(f"{name} {shape.label} in a graph: {' '.join(str(refused).split())[:200]}")
    if device.type == "cuda":
        extra["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    direction = "training step" if training else "forward"
    record.row(
        timed, op="model", variant="", implementation=name, shape=shape.label, dtype=dtype, direction=direction,
        images_per_s=1e3 * shape.batch / timed.ms, **extra,
    )  # fmt: skip


# ---- The plan -------------------------------------------------------------------------------------------------------

Task = tuple[str, float, Callable[[], None]]  # (name, seconds it needs at least, what it does)


def plan(record: Record, ceilings: timing.Ceilings, parts: list[str], device: torch.device, smoke: bool) -> list[Task]:
    """What to measure, the most important first."""
    tasks: list[Task] = []

    def operations(shape, dtype, ops=cases.OPS):
        for op in ops:
            for case in cases.cases_of(op, shape):
                if "ops" in parts and case.hot and case.variant != "uint8 channels_last":
                    what = f"{case.name} {shape.label} {dtype}"
                    tasks.append((what, 8.0, lambda case=case: run_case(record, ceilings, case, dtype, device)))

    def model(shape, names, training=False, dtype="bf16"):
        for name in names if "models" in parts else ():
            what = f"model {shape.label} {dtype} {name}{' training' if training else ''}"
            tasks.append((what, 15.0, lambda name=name: run_model(record, shape, dtype, name, training, device)))

    def stock_model(shape, compiled, training=False, dtype="bf16"):
        if "models" in parts and _version("timm") is not None:
            what = f"timm {shape.label} {dtype} {'compiled' if compiled else 'eager'}{' training' if training else ''}"
            seconds = 75.0 if compiled else 15.0
            tasks.append((what, seconds, lambda: run_timm(record, shape, dtype, compiled, training, device)))

    if smoke:
        operations(TINY, "fp32")
        operations(TINY, "bf16", ("layer_norm",))
        model(replace(TINY, image=32), ("auto", "torch"), dtype="fp32")
        model(replace(TINY, image=32), ("auto",), training=True, dtype="fp32")
        return tasks
    big, small = cases.shape_of("B"), cases.shape_of("B", batch=1)
    operations(big, "bf16")
    model(big, ("auto", "torch"))
    model(small, ("auto", "torch"))
    model(big, ("auto", "torch"), training=True)
    operations(small, "bf16")
    operations(replace(big, batch=8), "bf16")
    stock_model(big, compiled=False)
    stock_model(big, compiled=True)
    stock_model(big, compiled=True, training=True)
    model(replace(big, batch=8), ("auto", "torch"))
    operations(cases.shape_of("B", 384, 64), "bf16", ("attention", "mlp", "layer_norm"))
    for name in ("H", "L", "S"):
        operations(cases.shape_of(name), "bf16", ("attention", "mlp", "layer_norm"))
        model(cases.shape_of(name), ("auto", "torch"))
    stock_model(small, compiled=True)
    model(big, ("reference",))
    operations(big, "fp16")
    for name in ("H", "L", "S"):
        operations(cases.shape_of(name), "bf16", ("linear", "patch_embed"))
        stock_model(cases.shape_of(name), compiled=True)
    return tasks


def carry_out(record: Record, tasks: list[Task], device: torch.device) -> None:
    for what, seconds, task in tasks:
        if record.seconds_left() < seconds:
            record.skip(f"{what}: out of time")
            continue
        try:
            task()
        except torch.OutOfMemoryError:
            record.skip(f"{what}: out of memory")
        except Exception as failed:  # one broken measurement must not lose the others; it fails the run
            record.fail(f"{what}: {type(failed).__name__}: {' '.join(str(failed).split())[:300]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def lost(rows: list[dict]) -> list[str]:
    """Where our implementation is slower than stock PyTorch's best on the same call."""
    ours, stock = {}, {}
    for row in rows:
        key = (row["op"], row["variant"], row["direction"], row["shape"], row["dtype"])
        if row["implementation"] in ("triton", "cpp", "auto"):
            ours.setdefault(key, []).append(row)
        elif row["implementation"].startswith("torch"):
            stock.setdefault(key, []).append(row)
    told = []
    for key, mine in ours.items():
        if key in stock:
            best = min(stock[key], key=lambda r: r["ms"])
            for row in mine:
                if row["ms"] > LOST * best["ms"]:
                    told.append(
                        f"{' '.join(filter(None, key))}: {row['implementation']} {row['ms']:.4g} ms,"
                        f" {best['implementation']} {best['ms']:.4g} ms ({row['ms'] / best['ms']:.2f} times)"
                    )
    return told


# ---- Command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _parts(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(PARTS)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    p = _Parser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of results (default: bench/results)")
    p.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    p.add_argument("--parts", type=_parts, default=list(PARTS), help="comma-separated, of tests, ops, models (default: all)")
    p.add_argument("--tests", nargs="+", metavar="FILE", help="test files instead of the operations' and the model's")
    p.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, to try this program")
    args = p.parse_args(argv)
    if not args.minutes > 0:
        p.error(f"argument --minutes: must be positive, got {args.minutes}")
    if not args.smoke and not torch.cuda.is_available():
        print("gpu.py: no CUDA device (--smoke tries the program on the CPU)", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.smoke else "cuda")
    environment = environment_of(device, args.smoke)
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    commit = (environment["commit"] or "unknown") + ("-dirty" if environment["dirty"] else "")
    name = f"{environment['date'].replace(':', '').replace('-', '')}-{commit}.json"
    record = Record(args.out / slug, name, environment, args.minutes)

    def stop(signum, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        files = args.tests or ([] if args.smoke else TESTS)
        if "tests" in args.parts and files:
            run_tests(record, files, seconds=min(0.4 * record.seconds_left(), 210.0))
        ceilings = timing.measure_ceilings(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})
        record.data["ceilings"] = asdict(ceilings)
        record.save()
        record.say(f"ceilings: {ceilings.copy_tb_s:.3g} TB/s, {ceilings.products_tflop_s} TFLOP/s")
        carry_out(record, plan(record, ceilings, args.parts, device, args.smoke), device)
    except OutOfTime:
        record.skip("the rest: out of time")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return conclude(record, args.smoke)


def conclude(record: Record, smoke: bool) -> int:
    data = record.data
    data["lost"] = [] if smoke else lost(data["rows"])
    record.save()
    print(f"\n{len(data['rows'])} rows, {len(data['skipped'])} skipped -> {record.path}")
    print(f"lost to torch: {len(data['lost'])}" if not smoke else "smoke: no figure of this run means anything")
    for line in data["lost"]:
        print(f"  {line}")
    print(f"failed: {len(data['failed'])}")
    for line in data["failed"]:
        print(f"  {line}")
    return 1 if data["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
