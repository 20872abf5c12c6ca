"""A frozen model in one safetensors file: dense folded weights, and a header of JSON that says what they are. No pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING

import torch

from vit_fast.frozen.description import Architecture
from vit_fast.frozen.engine import computer_for
from vit_fast.frozen.fold import Folded, Normalisation

if TYPE_CHECKING:
    from vit_fast.frozen.model import Frozen

_KEY, FORMAT = "vit_fast.frozen", 1
_STEM = "stem."


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("a frozen model is saved with safetensors: pip install safetensors") from None
    return safetensors


def save(frozen: Frozen, path: str | os.PathLike) -> None:
    engine, options = frozen._engine, frozen.options
    tensors = {name: tensor.contiguous().cpu() for name, tensor in engine.weights().items()}
    header = {
        "format": FORMAT,
        "architecture": engine.architecture.to_json(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "activation": engine.activation,
        "unit": engine.computer.unit,
        "folded": frozen._folded,
        "options": dataclasses.asdict(options),
    }
    if engine.stem is not None:
        stem = engine.stem
        units = [len(block) for block in stem.body]
        header["stem"] = {"block_units": units, "width_factor": stem.width / 64, "impl": stem.impl}
        tensors |= {_STEM + name: tensor.cpu() for name, tensor in engine.stem.state_dict().items()}
    beside = f"{os.fspath(path)}.part"  # whoever reads the path meanwhile, or if this is cut short, finds a whole file or none
    try:
        _safetensors().torch.save_file(tensors, beside, metadata={_KEY: json.dumps(header)})
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def load(path: str | os.PathLike, device: torch.device, **changes) -> Frozen:
    from vit_fast.frozen.model import Frozen, Options
    from vit_fast.resnet import ResNetV2

    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {} if header is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {str(error).splitlines()[0]}") from None
    if header is None:
        raise ValueError(f"{path} holds no frozen model: those are written by Frozen.save")
    if header["format"] != FORMAT:
        raise ValueError(f"{path} is of format {header['format']}, this version reads format {FORMAT}")
    if "interpolate_positions" in changes:
        changes["any_size"] = changes.pop("interpolate_positions")
    saved = header["options"]
    unknown = set(changes) - set(saved) | changes.keys() & {"normalisation"}
    if unknown:
        raise TypeError(f"Frozen.load: it can't change {', '.join(sorted(unknown))}")
    saved |= changes
    if saved["normalisation"] is not None:
        saved["normalisation"] = Normalisation(**{name: tuple(values) for name, values in saved["normalisation"].items()})
    if isinstance(saved["outputs"], list):
        saved["outputs"] = tuple(saved["outputs"])
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, header["dtype"])
    stem = None
    if "stem" in header:
        stem = ResNetV2(**header["stem"]).to(dtype)
        stem.load_state_dict({name.removeprefix(_STEM): t for name, t in tensors.items() if name.startswith(_STEM)})
        stem = stem.to(device).eval().requires_grad_(False)
    weights = {name: tensor.to(device) for name, tensor in tensors.items() if not name.startswith(_STEM)}
    if saved["normalisation"] is not None:  # other kernels may want bytes divided by 255, or not
        factor = header["unit"] / computer_for(device, dtype).unit
        weights["patch.weight"] = (weights["patch.weight"].double() * factor).to(dtype)
    folded = Folded(Architecture.from_json(header["architecture"]), weights, header["activation"], header["folded"])
    return Frozen(folded, stem, device, dtype, Options(**saved))
