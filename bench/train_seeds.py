#!/usr/bin/env python3
"""Does the fused path's model end as good as the reference's? Several seeds of both, trained alike on MNIST's digits.

    python bench/train_seeds.py [--seeds 5] [--epochs 12] [--threads 2] [--json FILE]

Each run is the README's `vit-fast train` command with fewer epochs, and so with milder changes to the images and without the
running mean, which are for long runs. Prints the accuracy on the 1,000 digits held out for every run, their means and the noise
between seeds, and writes them to bench/results/<device>/training-seeds.json. Exit code 1 if the fused path's mean is lower by
more than two standard errors of the difference. Twenty to thirty seconds a run, by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from vit_fast.benchmarks.record import environment_of, rounded, slug_of  # noqa: E402
from vit_fast.cli import _parser  # noqa: E402
from vit_fast.train import open_data, train  # noqa: E402
from vit_fast.train.command import DIGITS, settings_of  # noqa: E402

SHORT = dict(ema=0.0, rotate=8.0, shift=0.05, zoom=0.1, shear=5.0)
PATHS = {"reference": "reference", "fused": "auto"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("seeds", "epochs", "threads"):
        if not getattr(arguments, name) > 0:
            parser.error(f"argument --{name}: a number above 0 is needed, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    environment = environment_of(torch.device("cpu"))
    settings = settings_of(_parser().parse_args(["train", *DIGITS.replace("\\\n", " ").split()]))
    settings = dataclasses.replace(settings, epochs=arguments.epochs, tensorboard=False, evaluate_every=10**9, **SHORT)
    data = open_data(settings.data)
    print(f"{environment['device']}, {arguments.threads} threads, torch {torch.__version__}, {arguments.epochs:g} epochs")
    accuracy: dict[str, list[float]] = {name: [] for name in PATHS}
    rows = []
    for seed in range(arguments.seeds):
        for name, implementation in PATHS.items():
            with tempfile.TemporaryDirectory() as folder:
                run = dataclasses.replace(settings, output=folder, seed=seed, implementation=implementation)
                result = train(run, data=data)
            accuracy[name].append(result.accuracy)
            row = {"seed": seed, "path": name, "accuracy": result.accuracy, "loss": result.loss, "seconds": result.seconds}
            rows.append({key: rounded(value) for key, value in row.items()})
            print(f"seed {seed}  {name:9}  {100 * result.accuracy:.2f} %  {result.seconds:.0f} s", flush=True)
    means = {name: statistics.mean(values) for name, values in accuracy.items()}
    noise = {name: statistics.stdev(values) for name, values in accuracy.items()}
    difference = means["fused"] - means["reference"]
    error = math.sqrt(sum(deviation**2 for deviation in noise.values()) / arguments.seeds)
    for name in accuracy:
        print(f"{name:9}  mean {100 * means[name]:.2f} %, between seeds {100 * noise[name]:.2f}")
    print(f"fused - reference: {100 * difference:+.2f}, two standard errors {200 * error:.2f}")
    summary = {"difference": rounded(difference), "two_standard_errors": rounded(2 * error)}
    for what, values in (("mean", means), ("between_seeds", noise)):
        summary[what] = {name: rounded(value) for name, value in values.items()}
    path = arguments.json or ROOT / "bench" / "results" / slug_of(environment) / "training-seeds.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "settings": settings.as_dict(), "rows": rows, "summary": summary}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0 if difference >= -2 * error else 1


if __name__ == "__main__":
    sys.exit(main())
