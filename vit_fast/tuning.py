"""Which implementation is fastest on this machine, as measured: what ``auto`` takes, and where that is kept.

A table says for an operation, a dtype, whether gradients are recorded, and a class of shapes, which implementation was fastest
among those within the error budget. Looked at are, the first that has an answer:

===================  ================================================================================================
``vit-fast tune``    the user's cache: ``vit_fast`` in the platform's cache folder, a file for each device. It counts for
                     the device, driver, torch, triton and vit_fast that it was written with; any other is left alone,
                     with a notice
``vit_fast/tables``  shipped: made from the committed results of the same device (``bench/results``)
the operation's file its order of implementations, where nobody measured
===================  ================================================================================================

The environment variable ``VIT_FAST_TUNING`` names another folder than the cache, or is ``off``: then the order counts.
Nothing is read before an operation first runs, and nothing while torch.compile traces: a compiled CPU model gets stock
operations, which the compiler fuses, and a compiled GPU model what is loaded by then (`load` does it at any time).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1
SHIPPED = Path(__file__).with_name("tables")
_ROWS = (256, 1024, 4096, 16384)  # classes of how many rows a call has: one image, a few, eight, thirty-two, more
_IMAGES = (1, 4, 16, 64)  # the same for attention, whose images are independent
_TOKENS = (64, 128, 256, 512, 1024)
SIZES = len(_ROWS) + 1


# ---- Classes of calls -----------------------------------------------------------------------------------------------


def _class_of(value, bounds: tuple[int, ...]) -> int:
    # Comparisons only: torch.compile may pass a symbol.
    for i, bound in enumerate(bounds):
        if value <= bound:
            return i
    return len(bounds)


def _layer_norm(x, weight, bias, eps, residual):
    columns = x.shape[-1]
    return _class_of(x.numel() // max(columns, 1), _ROWS), (columns, residual is not None)


def _linear(x, weight, bias, activation, residual, *dropped):
    outputs, inputs = weight.shape
    return _class_of(x.numel() // max(inputs, 1), _ROWS), (inputs, outputs, activation, residual is not None)


def _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, *dropped):
    hidden, inputs = fc1_weight.shape
    rows = _class_of(x.numel() // max(inputs, 1), _ROWS)
    return rows, (inputs, hidden, fc2_weight.shape[0], activation, residual is not None)


def _attention(qkv, dropout_p, probs):
    images, tokens, _, heads, size = qkv.shape
    return _class_of(images, _IMAGES), (_class_of(tokens, _TOKENS), heads, size, dropout_p > 0, probs)


def _patch_embed(images, weight, bias, cls_token, position_embeddings, mean, std):
    rows = images.shape[0] * position_embeddings.shape[1]
    return _class_of(rows, _ROWS), (*weight.shape, images.dtype == torch.uint8)


# The operation's arguments → (class of its size, all else that a choice depends on).
_CLASSES = {
    "layer_norm": _layer_norm,
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "patch_embed": _patch_embed,
}


def key_of(op: str, arguments: Sequence) -> tuple:
    """What calls with one answer have in common: (op, dtype, whether gradients are recorded, class of size, the rest)."""
    first = arguments[1] if op == "patch_embed" else arguments[0]  # the images may be bytes
    device = first.device.type
    # Under autocast products are computed in its dtype; the norm is not.
    dtype = first.dtype
    if op != "layer_norm" and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    recording = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    size, rest = _CLASSES[op](*arguments)
    return op, dtype, recording, size, rest


# ---- Devices --------------------------------------------------------------------------------------------------------


@functools.cache
def _cpu_description() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():  # the first of many
                    break
                name, _, value = line.partition(":")
                found[name.strip()] = value.strip()
    except OSError:
        pass
    return found


def cpu_vendor() -> str:
    """``GenuineIntel``, ``AuthenticAMD``, …; empty where nobody says."""
    import platform

    named = _cpu_description().get("vendor_id")
    return named or next((vendor for vendor in ("GenuineIntel", "AuthenticAMD") if vendor in platform.processor()), "")


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, rather than for float32 alone."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def cpu_identity() -> dict[str, str | None]:
    """The processor: its name, family and model as numbers, and the instruction set that torch uses."""
    import platform

    found = _cpu_description()
    numbers = [found[name] for name in ("cpu family", "model") if name in found]
    return {
        "name": found.get("model name") or platform.processor() or platform.machine(),
        "family": "-".join(numbers) or None,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def identity_of(device: torch.device, threads: int | None = None) -> dict:
    """What a table is good for: a CPU with so many threads, torch's own unless given; or a GPU."""
    if device.type == "cpu":
        return cpu_identity() | {"threads": threads or torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "multiprocessors": properties.multi_processor_count}


def versions_of(device: torch.device) -> dict:
    """What else a choice may depend on."""
    from vit_fast import __version__

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"vit_fast": __version__, "torch": torch.__version__, "triton": triton, "driver": _driver(device)}


def _driver(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"CUDA {torch._C._cuda_getDriverVersion()}" if torch.version.cuda else torch.version.hip
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else None


def file_name(identity: dict) -> str:
    words = [identity["name"], identity.get("family"), identity.get("capability"), identity.get("threads")]
    words += ["threads"] if identity.get("threads") else []
    text = " ".join(str(word) for word in words if word)
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", " ", text.lower())).strip("-") + ".json"


def folder() -> Path | None:
    """Where tables are kept; None where the environment says that they are off."""
    named = os.environ.get("VIT_FAST_TUNING")
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "vit_fast" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vit_fast"
    # The specification has relative paths ignored.
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "vit_fast"


# ---- Tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What was fastest for a class of calls, and the milliseconds of all that took part."""

    op: str
    dtype: str  # torch's name
    recording: bool  # forward and backward together; else forward alone
    size: int
    rest: tuple
    taken: str
    ms: dict[str, float]

    @property
    def key(self) -> tuple:
        return self.op, getattr(torch, self.dtype), self.recording, self.size, self.rest


@dataclass(frozen=True)
class Table:
    """The choices for a device."""

    source: str = "the operation's file"  # for people
    choices: tuple[Choice, ...] = ()
    launches: tuple[dict, ...] = ()  # of Triton kernels: function, arguments, config
    names: dict[tuple, str] = field(default_factory=dict)  # what `choice` looks up

    @classmethod
    def of(cls, source: str, choices: Sequence[Choice], launches: Sequence[dict] = ()) -> Table:
        """A size that nobody timed takes the answer of the nearest one that somebody did, the smaller of two."""
        groups: dict[tuple, dict[int, str]] = {}
        for c in choices:
            op, dtype, recording, size, rest = c.key
            groups.setdefault((op, dtype, recording, rest), {})[size] = c.taken
        names = {}
        for (op, dtype, recording, rest), by_size in groups.items():
            for size in range(SIZES):
                nearest = min(by_size, key=lambda measured: (abs(measured - size), measured))
                names[op, dtype, recording, size, rest] = by_size[nearest]
        return cls(source, tuple(choices), tuple(launches), names)


_NONE = Table()
_tables: dict[tuple, Table] = {}  # by device and threads
notices: list[str] = []  # what was wrong with files, each said once


def choice(op: str, arguments: Sequence) -> str | None:
    """What was measured fastest for such a call; None where nobody measured."""
    if op not in _CLASSES:
        return None
    device = (arguments[1] if op == "patch_embed" else arguments[0]).device
    if device.type == "cpu":
        # Measured was eager execution; the compiler's fusions are better than any single operation.
        if torch.compiler.is_compiling():
            return None
        where = ("cpu", torch.get_num_threads())
    elif device.type == "cuda":
        where = ("cuda", device.index)
    else:
        return None
    table = _tables.get(where)
    if table is None:
        if torch.compiler.is_compiling():
            return None
        table = load(device)
    if not table.names:
        return None
    return table.names.get(key_of(op, arguments))


def load(device: torch.device | str) -> Table:
    """Read the table of a device, now and again; it is in force from then on."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    where = ("cpu", torch.get_num_threads()) if device.type == "cpu" else (device.type, device.index)
    table = _tables[where] = _read(device)
    if device.type == "cuda":
        from vit_fast import kernels

        kernels.launches.update({(row["function"], *row["arguments"]): row["config"] for row in table.launches})
    return table


def forget() -> None:
    """Read everything anew when it is next needed."""
    from vit_fast import kernels

    _tables.clear()
    notices.clear()
    kernels.launches.clear()


def _read(device: torch.device) -> Table:
    where = folder()
    if where is None or device.type not in ("cpu", "cuda"):
        return _NONE
    identity = identity_of(device)
    path = where / file_name(identity)
    content = _content(path)
    if content is not None:
        now = identity | versions_of(device)
        before = content["identity"] | content["versions"]
        stale = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
        if not stale:
            source = f"vit-fast tune, {content['date'][:10]}"
            return Table.of(source, content["choices"], content.get("launches", ()))
        _notice(f"{path} was tuned with {'; '.join(stale)}: it is not used (vit-fast tune measures again)")
    return _shipped(identity)


def _shipped(identity: dict) -> Table:
    for path in sorted(SHIPPED.glob("*.json")):
        content = _content(path)
        if content is not None and all(
            value is None or identity.get(name) == value for name, value in content["identity"].items()
        ):
            source = f"shipped, measured {content['date'][:10]}"
            return Table.of(source, content["choices"], content.get("launches", ()))
    return _NONE


def _content(path: Path) -> dict | None:
    """What the file holds, its choices as `Choice`; None where there is none, or with a notice where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            _notice(f"{path} has format {content['format']}, this version reads {FORMAT}: it is not used")
            return None
        content["choices"] = [_choice(row) for row in content["choices"]]
        content["launches"] = [_launch(row) for row in content.get("launches", ())]
        if not (isinstance(content["identity"], dict) and isinstance(content["versions"], dict)):
            raise TypeError
        str.__getitem__(content["date"], slice(10))
    except FileNotFoundError:
        return None
    except OSError as error:
        _notice(f"{path} can't be read: {error.strerror}")
        return None
    except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or not what `write` writes
        _notice(f"{path} is damaged: it is not used (vit-fast tune measures again)")
        return None
    return content


def _choice(row: dict) -> Choice:
    found = Choice(**row | {"rest": tuple(row["rest"])})
    typed = isinstance(found.recording, bool) and isinstance(found.size, int) and isinstance(found.taken, str)
    if not typed or not isinstance(getattr(torch, found.dtype), torch.dtype) or found.op not in _CLASSES:
        raise TypeError
    hash(found.key)
    return found


def _launch(row: dict) -> dict:
    if not isinstance(row["function"], str) or not isinstance(row["config"], (list, dict)):
        raise TypeError
    return {"function": row["function"], "arguments": list(row["arguments"]), "config": row["config"]}


def _notice(text: str) -> None:
    if text not in notices:
        notices.append(text)
        warnings.warn(f"vit_fast: {text}", stacklevel=2)


# ---- Writing --------------------------------------------------------------------------------------------------------


def write(device: torch.device, choices: Sequence[Choice], launches: Sequence[dict], date: str) -> Path:
    """Put choices into the user's table of the device, beside what it holds for other calls; returns the file.

    OSError where it can't be written. Two processes that write at once wait for each other, and readers find a whole file.
    """
    where = folder()
    if where is None:
        raise OSError("VIT_FAST_TUNING is off")
    identity, versions = identity_of(device), versions_of(device)
    where.mkdir(parents=True, exist_ok=True)
    path = where / file_name(identity)
    with _locked(path.with_suffix(".lock")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is stale or damaged is written anew
            content = _content(path)
        if content is None or content["identity"] != identity or content["versions"] != versions:
            content = {"choices": [], "launches": []}
        kept = {c.key: c for c in content["choices"]} | {c.key: c for c in choices}
        by_call = {json.dumps([r["function"], r["arguments"]]): r for r in (*content["launches"], *launches)}
        write_file(path, identity, versions, date, list(kept.values()), list(by_call.values()))
    notices[:] = [notice for notice in notices if str(path) not in notice]
    return path


def write_file(path: Path, identity: dict, versions: dict, date: str, choices: Sequence[Choice], launches=()) -> None:
    """A whole table, in place of what was there, at once."""
    content = {
        "format": FORMAT,
        "date": date,
        "identity": identity,
        "versions": versions,
        "choices": [vars(c) | {"rest": list(c.rest)} for c in choices],
        "launches": list(launches),
    }
    head = {name: value for name, value in content.items() if name not in ("choices", "launches")}
    text = json.dumps(head, indent=1)[:-2]
    for name in ("choices", "launches"):  # a line for each
        rows = ",\n  ".join(json.dumps(row) for row in content[name])
        text += f',\n "{name}": [' + (f"\n  {rows}\n ]" if rows else "]")
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n}\n")
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with that file among all processes; it stays, empty, so that nobody locks one that another has deleted."""
    with open(path, "a+") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


# ---- From times to choices ------------------------------------------------------------------------------------------

STOCK = "torch"
WORTH = 0.99  # of stock PyTorch's time, at most: what is no faster than noise is not taken


def choices_from(rows: Sequence[dict]) -> list[Choice]:
    """The choices that rows of `vit_fast.benchmarks` speak for: their implementation is the fastest by its median.

    Inference is forward alone. Training is forward and backward together: an implementation that has lost one of them to the
    error budget has no row of it, and is not taken.
    """
    times: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["group"] == "operation":
            key = row["op"], row["variant"], row["shape"], row["dtype"]
            times.setdefault(key, {}).setdefault(row["contender"], {})[row["direction"]] = row["ms"]
    found = []
    for key, by_name in times.items():
        for recording, directions in ((False, ("forward",)), (True, ("forward", "backward"))):
            ms = {
                name: round(sum(taken[d] for d in directions), 5)
                for name, taken in by_name.items()
                if all(d in taken for d in directions) and name in ("torch", "triton", "cpp")
            }
            if STOCK not in ms or len(ms) < 2:
                continue
            best = min(ms, key=lambda name: ms[name])
            taken = best if ms[best] < WORTH * ms[STOCK] else STOCK
            op, dtype, _, size, rest = _key_of_case(*key, recording)
            found.append(Choice(op, str(dtype).removeprefix("torch."), recording, size, rest, taken, ms))
    return found


def _key_of_case(op: str, variant: str, shape: str, dtype: str, recording: bool) -> tuple:
    from vit_fast.benchmarks import cases

    match = re.fullmatch(r"(\w+)/\d+@(\d+) b(\d+)", shape)
    if match is None or match[1] not in cases.MODELS:
        raise ValueError(f"tuning: no model has the shape {shape!r}")
    case = cases.find(op, variant, cases.shape_of(match[1], int(match[2]), int(match[3])))
    with torch.set_grad_enabled(recording):
        return key_of(op, case.arguments(cases.Maker("meta", cases.DTYPES[dtype])))
