#!/usr/bin/env python3
"""The operations on this CPU: the extension against stock PyTorch, and both against what the machine can do.

    python bench/cpu.py [--batches 1,8] [--dtypes fp32,bf16] [--ops layer_norm,linear] [--model B] [--seconds 1] [--json FILE]

Every operation at the model's shapes, forward and backward. Before a result is timed it is held against the float64 reference
within the project's error budget. Times are taken by turns, A B A B …, so that a drifting machine meets both alike; the
speed-up is the median of the rounds' ratios, with its 20th and 80th percentile. Inputs stay the same from call to call: they
are as warm as a block's are, coming from the operation before.

    GB/s, of copy          the bytes that the call must move, and their rate beside a copy of as many bytes in the same rounds
    GFLOP/s, of product    the multiply-adds, and their rate beside torch's 1536³ product, measured in the same run

Exit code 1 if a check failed, 2 without the extension or for a wrong argument.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import cases  # noqa: E402
import gpu  # noqa: E402
import torch  # noqa: E402

from vit_fast import backends, extension, info  # noqa: E402

VARIANTS = {  # those that differ on a CPU
    "layer_norm": ("", "+residual"),
    "attention": ("", "probs=all"),
    "linear": ("qkv", "out+residual", "fc1", "fc1+gelu", "fc1+gelu_tanh", "fc2+residual"),
    "mlp": ("+residual",),
    "patch_embed": ("", "uint8", "uint8 channels_last"),
}
DTYPES = ("fp32", "bf16")
BATCHES = (1, 8)


@dataclass(frozen=True)
class Row:
    """One call, both implementations. Milliseconds are medians."""

    op: str
    variant: str
    direction: str
    shape: str
    dtype: str
    torch_ms: float
    cpp_ms: float
    speed_up: float
    p20: float
    p80: float
    rounds: int
    gb_s: float
    of_copy: float
    gflop_s: float
    of_product: float

    def __str__(self) -> str:
        name = f"{self.op} {self.variant}".strip()
        work = f"{self.gflop_s:6.0f} GFLOP/s {100 * self.of_product:4.0f} %" if self.gflop_s else ""
        times = f"{self.torch_ms:8.3f} {self.cpp_ms:8.3f} ms  {self.speed_up:5.2f}x ({self.p20:.2f}-{self.p80:.2f})"
        moved = f"{self.gb_s:6.1f} GB/s {100 * self.of_copy:4.0f} %"
        return f"{name:30} {self.direction:9} {self.shape:12} {self.dtype}  {times}  {moved}  {work}".rstrip()


def by_turns(calls: dict[str, Callable], seconds: float, least: int = 7, most: int = 400) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; a round takes every call once, or a short one several times."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.002 / max(time.perf_counter() - start, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return taken


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's product of two square matrices: the best of a second."""
    side = 1536
    x, y = (torch.randn(side, side).to(dtype) for _ in range(2))
    best = min(by_turns({"product": lambda: x @ y}, 1.0)["product"])
    return 2 * side**3 / best / 1e6


def run_case(case: cases.Case, dtype: str, products: dict[str, float], seconds: float) -> tuple[list[Row], list[str]]:
    torch_dtype = cases.DTYPES[dtype]
    arguments = case.arguments(cases.Maker("cpu", torch_dtype, seed=0))
    where = f"{case.name} {case.shape.label} {dtype}"
    runs = {}
    for name in ("torch", "cpp"):
        run = gpu.contenders(case, arguments)[name]
        if isinstance(run, str):
            return [], [f"{where}: {name} can't: {run}"]
        runs[name] = run
    exact = gpu.Exact(case, arguments)
    broken = [f"{where}: {name}: {line}" for name, run in runs.items() for line in exact.check(run, arguments)]
    if broken:
        return [], broken
    rows = []
    for direction in ("forward", "backward"):
        work = case.work(direction, torch_dtype.itemsize)
        if direction == "forward":
            calls = {name: functools.partial(gpu._without_gradients, run, arguments) for name, run in runs.items()}
        else:
            calls = {}
            for name, run in runs.items():
                given = (gpu.tensors(run(*arguments)), gpu.leaves(arguments), exact.cotangents)
                calls[name] = functools.partial(torch.autograd.grad, *given, retain_graph=True)
        source = torch.ones(int(work.bytes / 2), dtype=torch.uint8)  # reading and writing them moves as many
        target = torch.zeros_like(source)
        taken = by_turns({**calls, "copy": functools.partial(target.copy_, source)}, seconds)
        middle = {name: statistics.median(ms) for name, ms in taken.items()}
        ratios = [t / c for t, c in zip(taken["torch"], taken["cpp"], strict=True)]
        cuts = statistics.quantiles(ratios, n=10, method="inclusive")
        gflop_s = work.flops / middle["cpp"] / 1e6
        rows.append(
            Row(
                case.op,
                case.variant,
                direction,
                case.shape.label,
                dtype,
                middle["torch"],
                middle["cpp"],
                statistics.median(ratios),
                cuts[1],
                cuts[7],
                len(ratios),
                work.bytes / middle["cpp"] / 1e6,
                middle["copy"] / middle["cpp"],
                gflop_s,
                gflop_s / products[dtype],
            )  # fmt: skip
        )
        print(rows[-1], flush=True)
    return rows, []


def _names(choices) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        for name in chosen:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(choices)}")
        return chosen

    return parse


def _numbers(text: str) -> list[int]:
    values = [int(n) if n.strip().isdigit() else 0 for n in text.split(",")]
    if 0 in values:
        raise argparse.ArgumentTypeError(f"must be positive whole numbers, got {text!r}")
    return values


def main(argv: list[str] | None = None) -> int:
    p = gpu._Parser(prog="cpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=_numbers, default=list(BATCHES), help="comma-separated (default: 1,8)")
    p.add_argument("--dtypes", type=_names(DTYPES), default=["fp32"], help="of fp32, bf16 (default: fp32)")
    p.add_argument("--ops", type=_names(tuple(VARIANTS)), default=list(VARIANTS), help="comma-separated (default: all)")
    p.add_argument("--model", choices=tuple(cases.MODELS), default="B", help="whose shapes (default: B)")
    p.add_argument("--seconds", type=float, default=1.0, help="for each line at least (default: 1)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with versions and machine, there")
    args = p.parse_args(argv)
    if not args.seconds > 0:
        p.error(f"argument --seconds: must be positive, got {args.seconds}")
    if args.json and not args.json.parent.is_dir():
        p.error(f"argument --json: there is no folder {args.json.parent}")
    if (reason := extension.missing("cpu")) is not None:
        print(f"cpu.py: {reason}", file=sys.stderr)
        return 2
    environment = gpu.environment_of(torch.device("cpu"), smoke=False) | {
        "device": info.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": extension.instruction_set(),
    }
    products = {dtype: product_rate(cases.DTYPES[dtype]) for dtype in args.dtypes}
    told = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in products.items())
    print(f"{environment['device']}, {environment['threads']} threads, {environment['instruction_set']}; product: {told}")
    titles = f"{'operation':30} {'direction':9} {'shape':12} dtype {'torch':>8} {'cpp':>8}"
    print(f"{titles}     torch/cpp (p20-p80)         of copy          of product")
    rows, failed = [], []
    for dtype in args.dtypes:
        for batch in args.batches:
            for op in args.ops:
                for variant in VARIANTS[op]:
                    case = cases.find(op, variant, cases.shape_of(args.model, batch=batch))
                    with backends.use("cpp"):  # `auto` would leave out what is not worth it
                        done, broken = run_case(case, dtype, products, args.seconds)
                    rows += done
                    failed += broken
    if args.json:
        rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
        record = {"format": 1, "environment": environment, "products_gflop_s": products, "rows": rounded, "failed": failed}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    slower = [row for row in rows if row.p80 < 1]
    print(f"\n{len(rows)} lines; slower than torch in four rounds of five: {len(slower)}; failed: {len(failed)}")
    for line in [*slower, *failed]:
        print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
