"""The tests of the operations and the model at real shapes, each file in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vit_fast.benchmarks.record import Record

ROOT = Path(__file__).resolve().parents[1]
_TESTED = ("attention", "linear", "dropout", "layer_norm", "patch_embed", "extension_cuda", "modeling", "modules", "freeze")
TESTS = [f"tests/{'frozen/' if name == 'freeze' else ''}test_{name}.py" for name in _TESTED]


def run_tests(record: Record, files: list[str], seconds: float) -> None:
    """A fault on the device ends one file's process only. Several at a time where there is room."""
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
