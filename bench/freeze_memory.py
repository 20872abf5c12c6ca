#!/usr/bin/env python3
"""The most memory that a forward pass takes: of a model by its reference path, and of freeze() of it once the model is gone.

    python bench/freeze_memory.py [--model ViT-B_16] [--batch 1,8]

The resident set's peak during a second forward pass, each in a process of its own, float32, all tokens. Linux; for CPUs.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]


def peak(model: str, batch: int, frozen: bool) -> float:
    """Megabytes, in this process."""
    import torch

    from vit_fast import CONFIGS, VisionTransformer, freeze, use

    source = VisionTransformer(CONFIGS[model], 224, num_classes=1000).eval()
    images = torch.randn(batch, 3, 224, 224)
    run = source
    if frozen:
        run = freeze(source, check=False, class_token_only=False)
        del source
    with torch.no_grad(), use("auto" if frozen else "reference"):
        run(images)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        run(images)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> int:
    p = argparse.ArgumentParser(
        prog="freeze_memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="ViT-B_16")
    p.add_argument("--batch", default="1,8")
    p.add_argument("--one", choices=("source", "frozen"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(peak(args.model, int(args.batch), args.one == "frozen"))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        p.error("it needs Linux's /proc")
    from vit_fast import CONFIGS

    if args.model not in CONFIGS:
        p.error(f"argument --model: there is no {args.model!r}; there is {', '.join(CONFIGS)}")
    if not all(part.isdecimal() and int(part) for part in args.batch.split(",")):
        p.error(f"argument --batch: whole numbers from 1 on are needed, with commas between, got {args.batch!r}")
    for batch in args.batch.split(","):
        found = {}
        for one in ("source", "frozen"):
            command = [sys.executable, __file__, "--model", args.model, "--batch", batch, "--one", one]
            found[one] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = found["frozen"] / found["source"]
        print(
            f"{args.model}, batch {batch}: source {found['source']:.0f} MB, frozen {found['frozen']:.0f} MB, {ratio:.2f} of it"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
