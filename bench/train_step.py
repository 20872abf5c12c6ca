#!/usr/bin/env python3
"""A training step on this CPU: the reference path against the fused one, by turns in one run, activations' memory beside it.

    python bench/train_step.py [--model ViT-B_16] [--batch 8] [--rounds 7] [--dtype float32|bfloat16] [--dropout 0.1]

A step is forward, backward, and AdamW's update: without dropout; with that of the embeddings and the MLP; and with that of the
attention and stochastic depth too. The speed-up is the median of the rounds' ratios, with its 20th and 80th
percentile. Activations are what the forward pass keeps for the backward pass, parameters not counted: bytes of distinct memory.
Written to bench/results/<device>/training-step.json too, or to --json FILE.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from vit_fast import CONFIGS, VisionTransformer, use  # noqa: E402
from vit_fast.benchmarks.memory import kept_bytes  # noqa: E402
from vit_fast.benchmarks.record import environment_of, rounded, slug_of  # noqa: E402

CONTENDERS = {"reference": "reference", "fused": "auto"}

DROPPED = {
    "nothing": (),
    "dropout": ("dropout_rate",),
    "dropout, attention's too, stochastic depth": ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"),
}


def make(name: str, p: float, rates: tuple[str, ...]) -> tuple[VisionTransformer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.transformer.update({"dropout_rate": 0.0} | dict.fromkeys(rates, p))
    model = VisionTransformer(config, img_size=224, num_classes=1000).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B_16", choices=[name for name in CONFIGS if name != "testing"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("batch", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"argument --{name}: a whole number from 1 on is needed, got {getattr(arguments, name)}")
    if not 0 <= arguments.dropout <= 1:
        parser.error(f"argument --dropout: a number from 0 to 1 is needed, got {arguments.dropout}")
    torch.set_num_threads(arguments.threads)
    images = torch.randn(arguments.batch, 3, 224, 224)
    labels = torch.randint(1000, (arguments.batch,))
    environment, rows = environment_of(torch.device("cpu")), []
    print(f"{arguments.model}, {arguments.batch} images of 224 pixels, {arguments.dtype}; {environment['device']}, ", end="")
    print(f"{arguments.threads} threads, torch {torch.__version__}", flush=True)
    for dropped, rates in DROPPED.items():
        model, optimizer = make(arguments.model, arguments.dropout, rates)

        def forward(model=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                return model(images, labels)

        def step(forward=forward, optimizer=optimizer) -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        memory = {}
        for round_ in range(arguments.rounds + 1):  # one to warm up
            for name, implementation in CONTENDERS.items():
                with use(implementation):
                    if round_ == 0:
                        memory[name] = kept_bytes(forward, model.parameters(), images.device)
                    start = time.perf_counter()
                    step()
                    if round_:
                        seconds[name].append(time.perf_counter() - start)
        ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
        low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        reference, fused = (1e3 * statistics.median(values) for values in seconds.values())
        speed_up, share = statistics.median(ratios), memory["fused"] / memory["reference"]
        kept = {name: memory[name] / 2**20 for name in memory}
        print(
            f"dropped: {dropped}: reference {reference:.0f} ms, fused {fused:.0f} ms, {speed_up:.2f}x ({low:.2f}-{high:.2f}),"
            f" {len(ratios)} rounds; activations {kept['reference']:.0f} MiB, {kept['fused']:.0f} MiB, {share:.2f}",
            flush=True,
        )
        row = {"dropped": dropped, "p": arguments.dropout if rates else 0.0, "reference_ms": reference, "fused_ms": fused}
        row |= {"speed_up": speed_up, "p20": low, "p80": high}
        row |= {"rounds": len(ratios), "reference_mib": kept["reference"], "fused_mib": kept["fused"], "memory_ratio": share}
        rows.append({name: rounded(value) for name, value in row.items()})
    path = arguments.json or ROOT / "bench" / "results" / slug_of(environment) / "training-step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(arguments, name) for name in ("model", "batch", "dtype")}
    path.write_text(json.dumps({"environment": environment, **asked, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
