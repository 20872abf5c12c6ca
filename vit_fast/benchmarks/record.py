"""The JSON file of a run, written after every measurement, and the machine and versions that it was made on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import vit_fast
from vit_fast import extension
from vit_fast.benchmarks.timing import Ceilings, Timing
from vit_fast.terminal import CommandError

FORMAT = 2
PACKAGES = ("triton", "numpy", "timm", "transformers", "torchvision", "onnxruntime", "openvino")
KEYS = ("group", "op", "variant", "direction", "shape", "dtype", "contender")  # no two rows agree in all


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEYS)


def rounded(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Record:
    """Rows, what was skipped and why, what failed. ``say`` prints what happens, a line at a time."""

    def __init__(self, path: Path, environment: dict, minutes: float | None = None, say: Callable[[str], None] | None = None):
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._say = say or (lambda text: print(f"{self.seconds_left():5.0f}s left  {text}", flush=True))
        self.path = path
        self.data = {"format": FORMAT, "environment": environment, "ceilings": None}
        self.data |= {"rows": [], "done": [], "skipped": [], "failed": []}
        self.save()

    @classmethod
    def resumed(cls, path: Path, environment: dict, minutes: float | None = None, say=None) -> Record:
        """The record in that file, to go on with. CommandError where another machine, version or commit began it."""
        data = read(path)
        for name in ("device", "threads", "torch", "vit_fast", "commit"):
            before, now = data["environment"].get(name), environment.get(name)
            if before != now:
                raise CommandError(f"{path} was begun with {name} {before}, this is {now}: what it holds can't be continued")
        record = cls.__new__(cls)
        record._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        record._say = say or (lambda text: print(f"{record.seconds_left():5.0f}s left  {text}", flush=True))
        record.path, record.data = path, data
        # What the last run had no time for, or could not do, is tried again.
        record.data |= {"skipped": [], "failed": []}
        return record

    @property
    def rows(self) -> list[dict]:
        return self.data["rows"]

    def seconds_left(self) -> float:
        return float("inf") if self._deadline is None else self._deadline - time.monotonic()

    def save(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise CommandError(f"{self.path} can't be written: {error.strerror}") from None

    def say(self, text: str) -> None:
        self._say(text)

    def ceilings(self, ceilings: Ceilings) -> None:
        """What this run reached; products of dtypes that only the run before a resumed one measured stay."""
        before = (self.data["ceilings"] or {}).get("products_tflop_s", {})
        self.data["ceilings"] = asdict(ceilings)
        self.data["ceilings"]["products_tflop_s"] = before | ceilings.products_tflop_s
        self.save()

    def skip(self, what: str) -> None:
        self.data["skipped"].append(what)
        self.save()
        self.say(f"skipped: {what}")

    def fail(self, what: str) -> None:
        self.data["failed"].append(what)
        self.save()
        self.say(f"FAILED: {what}")

    def finish(self, task: str) -> None:
        """The task is complete: a resumed run leaves it out."""
        self.data["done"].append(task)
        self.save()

    def row(self, timed: Timing, **labels) -> dict:
        """Keep a row, in place of an older one about the same."""
        row = {name: labels.get(name, "") for name in KEYS} | asdict(timed) | labels
        row = {name: rounded(value) for name, value in row.items()}
        self.data["rows"] = [r for r in self.rows if key_of(r) != key_of(row)] + [row]
        self.save()
        names = (row["op"], row["variant"], row["direction"], row["shape"], row["dtype"], row["contender"])
        parts = [f"{' '.join(filter(None, names)):72s} {row['ms']:10.4f} ms"]
        if "speed_up" in row:
            parts.append(f"{row['speed_up']:5.2f}x of {row['against']}")
        if "of_ceiling" in row:
            parts.append(f"{100 * row['of_ceiling']:3.0f} % of the ceiling")
        if "images_per_s" in row:
            parts.append(f"{row['images_per_s']:,.1f} img/s")
        self.say("  ".join(parts))
        return row


def read(path: Path) -> dict:
    """The content of a record's file; CommandError where it is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:
        raise CommandError(f"{path} is not JSON: it is damaged, or not a file of vit-fast bench") from None
    if not isinstance(data, dict) or "rows" not in data or "environment" not in data:
        raise CommandError(f"{path} is not a file of vit-fast bench")
    if data.get("format") != FORMAT:
        raise CommandError(f"{path} has format {data.get('format')}, this version reads {FORMAT}")
    if not all(isinstance(row, dict) and {*KEYS, "ms", "p20", "p80"} <= set(row) for row in data["rows"]):
        raise CommandError(f"{path} has rows without their names or times: it is damaged")
    return data


# ---- The machine ----------------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment_of(device: torch.device, smoke: bool = False) -> dict:
    """Versions, commit and machine, as a record keeps them."""
    root = Path(vit_fast.__file__).resolve().parents[1]

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # An installed wheel may lie below somebody else's repository.
    checkout = (root / "csrc" / "ops.cpp").is_file() and (root / ".git").exists()
    # What a program before this one wrote into the results is no change to what is measured.
    changes = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    status = output(*changes) if checkout else None
    found = {
        "smoke": smoke,
        "vit_fast": vit_fast.__version__,
        "commit": output("git", "rev-parse", "--short=10", "HEAD") if checkout else None,
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version_of(package) for package in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": extension.instruction_set() if extension.missing("cpu") is None else None,
    }
    found |= _gpu(device, output) if device.type == "cuda" else _cpu(smoke)
    return found


def _cpu(smoke: bool) -> dict:
    from vit_fast.tuning import cpu_identity

    identity = cpu_identity()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    clocks = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            clocks = [float(line.partition(":")[2]) for line in file if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        pass
    return {
        "device": "cpu-smoke" if smoke else identity["name"],
        "family": identity["family"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "clock_mhz": round(max(clocks)) if clocks else None,
        "load_at_start": None if load is None else round(load, 2),
    }


def _gpu(device: torch.device, output: Callable[..., str | None]) -> dict:
    properties = torch.cuda.get_device_properties(device)
    clocks = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    index = device.index or 0
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": {clocks: output("nvidia-smi", f"--query-gpu={clocks}", "--format=csv,noheader", f"--id={index}")},
    }


def slug_of(environment: dict) -> str:
    """A folder's name for the device: ``amd-epyc-avx512``, ``nvidia-h100-80gb-hbm3``."""
    name = environment["device"]
    if environment.get("instruction_set") and "multiprocessors" not in environment and not environment["smoke"]:
        name = re.sub(r"\((r|tm)\)|processor|cpu|@.*", " ", name, flags=re.I) + " " + environment["instruction_set"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
