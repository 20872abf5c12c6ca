r"""Weights in and out: Google's .npz files, state dicts, safetensors, and position tables of another image size.

============================  ==========================================================================================
`load`                        a file or a mapping into a model; all of it, or one error that lists what does not fit
`save`                        a model to safetensors
`from_google`                 Google's arrays as a state dict with this package's keys; `to_google` is the inverse
`load_npz`                    a Google or big_vision file as a dict of arrays
`read_state_dict`             a ``.bin``, ``.pt``, ``.pth`` or ``.safetensors`` file as a state dict
`resize_position_embeddings`  a position table for another grid of patches
============================  ==========================================================================================

Nothing that is read is ever unpickled as Python objects. Sources of the formats: google-research/vision_transformer
(``vit_jax/checkpoint.py``), google-research/big_vision (``big_vision/models/vit.py``, ``big_vision/utils.py``).

``pre_logits`` (a layer between encoder and head in some files trained on ImageNet-21k) has no counterpart here, nor in the
original, and is left out; `load` warns when the head behind it is used all the same.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast.google import (
    ATTENTION,
    BACKBONE,
    EMBEDDINGS,
    HEAD,
    CheckpointError,
    Grid,
    bare_model,
    canonical,
    existing_file,
    from_google,
    from_readers,
    load_npz,
    read_npz,
    to_google,
)

__all__ = [
    "CheckpointError",
    "from_google",
    "load",
    "load_block",
    "load_npz",
    "load_unit",
    "read_state_dict",
    "resize_position_embeddings",
    "save",
    "to_google",
]

# ---- Position tables ------------------------------------------------------------------------------------------------


def resize_position_embeddings(table: Tensor, old_grid: Grid, new_grid: Grid, num_prefix: int = 1) -> Tensor:
    r"""The position table for another grid of patches: bilinear, with the corners kept in place.

    .. math:: E'_{ij} = E\left(i \tfrac{h-1}{h'-1},\; j \tfrac{w-1}{w'-1}\right)

    :param table: [1, num_prefix + h·w, D]; the first ``num_prefix`` rows (the class token's) are kept as they are.
    :param old_grid: (h, w) of the table. :param new_grid: (h', w') wanted. Neither has to be square.
    :returns: [1, num_prefix + h'·w', D] in the table's dtype; differentiable. The table itself when the grids are equal.
    :raises ValueError: a table that does not have the rows that ``old_grid`` asks for; an empty grid.

    It is what the original and Google compute with ``scipy.ndimage.zoom(order=1)``, but for a fault of scipy's default mode:
    for some pairs of sizes, such as 16 → 30 or 24 → 22, rounding puts its last coordinate outside the table, and the last row
    and column come out zero. Here they do not: the result is that of ``zoom(order=1, mode="nearest")`` for every pair.
    """
    (h, w), (new_h, new_w) = old_grid, new_grid
    if table.dim() != 3 or table.shape[:2] != (1, num_prefix + h * w):
        raise ValueError(
            f"resize_position_embeddings: table must be [1, {num_prefix + h * w}, D] for a {h}x{w} grid"
            f" and {num_prefix} prefix rows, got {list(table.shape)}"
        )
    if min(h, w, new_h, new_w) < 1:
        raise ValueError(f"resize_position_embeddings: grids must have at least one patch, got {h}x{w} and {new_h}x{new_w}")
    if (h, w) == (new_h, new_w):
        return table
    prefix, rows = table[:, :num_prefix], table[:, num_prefix:]
    grid = rows.unflatten(1, (h, w)).permute(0, 3, 1, 2)
    # float64, since coordinates are computed in it too: float32 ones are off by 1e-5 of a cell on large grids. MPS has none.
    grid = grid.to(torch.float32 if table.device.type == "mps" else torch.float64)
    grid = F.interpolate(grid, size=(new_h, new_w), mode="bilinear", align_corners=True)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


# ---- State-dict files -----------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def read_state_dict(path: str | os.PathLike) -> dict[str, Any]:
    """The state dict in a ``.safetensors`` file, or in one by ``torch.save`` (``.bin``, ``.pt``, ``.pth``, …), on the CPU.

    Wrappers are taken off: ``{"state_dict": …}``, ``{"model": …}``, ``{"model_state_dict": …}``, ``{"module": …}``, and the
    prefixes ``module.`` (DistributedDataParallel) and ``_orig_mod.`` (torch.compile).

    :raises CheckpointError: a damaged file, one that is no state dict, or one with Python objects other than tensors and plain
        containers, which are never loaded (``weights_only=True``).
    :raises OSError: a file that is missing or can't be read. ImportError: a safetensors file without that package.
    """
    path = existing_file(path)
    if path.suffix == ".safetensors":
        return _unwrapped(_read_safetensors(path)[0])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no file by torch.save, or it holds Python objects other than tensors, which are not loaded since"
            f" unpickling runs code; from a whole model that you trust, save its state_dict() ({_first_line(error)})"
        ) from None
    except (EOFError, RuntimeError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek in a file that was cut off
            raise
        raise CheckpointError(f"{path} is damaged, or no file by torch.save ({_first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, it holds a {type(content).__name__}")
    return _unwrapped(content)


def _unwrapped(content: Mapping) -> dict[str, Any]:
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(content.get(wrapper), Mapping):
            return _unwrapped(content[wrapper])
    return _without_prefixes(content)


def _without_prefixes(state: Mapping) -> dict[str, Any]:
    state = dict(state)
    for prefix in ("module.", "_orig_mod.", "module."):  # either may wrap the other
        if state and all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("safetensors files need the package safetensors: pip install safetensors") from None
    return safetensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or it is damaged ({error})") from None


def save(model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the model's state dict to a ``.safetensors`` file; `load` gives back the same bits. Returns the path.

    The file's metadata says ``config`` (the name in CONFIGS, if it is one of them), ``num_heads``, ``num_classes``,
    ``image_size`` and ``grid`` (height x width), and what ``metadata`` adds to them. It is written beside the target and then
    renamed: a crash leaves an old file whole.

    :raises ValueError: another file name. OSError: a path that can't be written. ImportError: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save: the file name must end in .safetensors, got {path}")
    safetensors = _safetensors()
    model = bare_model(model)
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # the format has no tied tensors
        storages.add(storage)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the umask makes of a new file; safetensors writes files for the owner alone
        safetensors.torch.save_file(tensors, temporary, metadata={**_describe(model), **(metadata or {})})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"save: can't write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _describe(model: nn.Module) -> dict[str, str]:
    """What a reader of the file wants to know; every value is text, as the format demands."""
    description = {"format": "pt", "library": "vit_fast"}
    if name := _config_name(model):
        description["config"] = name
    if (num_classes := getattr(model, "num_classes", None)) is not None:
        description["num_classes"] = str(num_classes)
    layers = getattr(getattr(getattr(model, "transformer", None), "encoder", None), "layer", ())
    if len(layers):  # what no tensor's shape tells
        description["num_heads"] = str(layers[0].attn.num_attention_heads)
    embeddings = getattr(getattr(model, "transformer", None), "embeddings", None)
    for key, attribute in (("image_size", "img_size"), ("grid", "grid")):
        if (size := getattr(embeddings, attribute, None)) is not None:
            description[key] = f"{size[0]}x{size[1]}"
    return description


def _config_name(model: nn.Module) -> str | None:
    """The entry of CONFIGS that this model was built from, told by its sizes."""
    from vit_fast.configs import name_of

    try:
        embeddings, layers = model.transformer.embeddings, model.transformer.encoder.layer
        fc1, heads = layers[0].ffn.fc1, layers[0].attn.num_attention_heads
        patch = None if embeddings.hybrid else tuple(embeddings.patch_embeddings.kernel_size)
        return name_of(fc1.in_features, fc1.out_features, len(layers), patch, heads)
    except (AttributeError, IndexError):
        return None


# ---- Loading --------------------------------------------------------------------------------------------------------


def load(model: nn.Module, source: str | os.PathLike | Mapping, *, head: str = "strict", grid: Grid | None = None) -> nn.Module:
    """Load weights into a VisionTransformer's parameters, in place; all of them or none. Returns the model.

    :param source: a Google or big_vision ``.npz`` file; a ``.safetensors`` file or one by ``torch.save`` with a state dict of
        this package or the original; or what these hold, as a mapping (``np.load(path)``, ``torch.load(path)``). Values are
        cast to the parameters' dtype and moved to their device.
    :param head: ``"strict"``: the head is loaded, and must fit. ``"drop"``: the file's head is ignored, the model's left alone.
        As in the original, a model built with ``zero_head=True`` gets a head of zeros from Google's arrays; state dicts, which
        may come from fine-tuning that very model, bring their own.
    :param grid: (h, w) of the file's position table. A table whose grid is not that of ``model.transformer.embeddings.grid`` is
        resized. Unless told here or by the file's metadata, the file's grid is the model's if the sizes agree, else square.
    :raises CheckpointError: everything that is missing, left over, misshapen or not floating point, in one message.
    :raises OSError: a file that is missing or can't be read. ImportError: a safetensors file without that package.
    """
    if head not in ("strict", "drop"):
        raise ValueError(f"load: head must be 'strict' or 'drop', got {head!r}")
    model = bare_model(model)
    content, file_grid, what = _read(source)
    grid = grid or file_grid
    google = any("/" in str(key) for key in content)
    readers = canonical(content) if google else {}
    state = from_readers(readers, grid or tuple(model.transformer.embeddings.grid)) if google else _unwrapped(content)
    targets = model.state_dict(keep_vars=True)
    if google and getattr(model, "zero_head", False):
        state.update({name: torch.zeros_like(targets[name]) for name in HEAD if name in targets})
    elif head == "drop":
        for name in HEAD:
            state.pop(name, None)
            targets.pop(name, None)

    problems = [_resize(model, state, grid), *_differences(targets, state)]
    if google:
        problems.append(_other_heads(model, readers))
    _raise_if_any(f"{what} does not fit the model", problems)
    if any("pre_logits/" in str(key) for key in content) and HEAD[0] in targets and bool(state[HEAD[0]].any()):
        warnings.warn(
            f"{what} has a pre_logits layer, which this model lacks; its head was trained behind that layer, so the logits mean"
            " nothing: fine-tune with head='drop', or with a model built with zero_head=True",
            stacklevel=2,
        )
    _copy(targets, state)
    return model


def load_block(block: nn.Module, weights: Mapping, n_block: str | int) -> None:
    """Copy block ``n_block`` of Google's arrays into an encoder block; CheckpointError, as in `load`, if they do not fit."""
    _load_part(block, weights, f"Transformer/encoderblock_{n_block}/", f"transformer.encoder.layer.{n_block}.")


def load_unit(unit: nn.Module, weights: Mapping, n_block: str, n_unit: str) -> None:
    """Copy one residual unit (``"block1"``, ``"unit2"``) of Google's arrays into a PreActBottleneck, as `load_block` does."""
    _load_part(unit, weights, f"{n_block}/{n_unit}/", f"{BACKBONE}body.{n_block}.{n_unit}.")


def _load_part(part: nn.Module, weights: Mapping, google_prefix: str, our_prefix: str) -> None:
    readers = {name: read for name, read in canonical(weights).items() if name.startswith(google_prefix)}
    state = {key.removeprefix(our_prefix): value for key, value in from_readers(readers, None).items()}
    targets = part.state_dict(keep_vars=True)
    _raise_if_any(f"the arrays {google_prefix}… do not fit the {type(part).__name__}", _differences(targets, state))
    _copy(targets, state)


def _read(source: str | os.PathLike | Mapping) -> tuple[Mapping, Grid | None, str]:
    """The content of a file or mapping, the grid that its metadata tell, and what to call it."""
    if isinstance(source, Mapping):
        return source, None, "the mapping"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load: source must be a path or a mapping of names to arrays, got {type(source).__name__}")
    path = Path(source)
    if path.suffix == ".npz":
        return read_npz(path), None, str(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(existing_file(path))
        match = re.fullmatch(r"(\d+)x(\d+)", metadata.get("grid", ""))
        return tensors, (int(match[1]), int(match[2])) if match else None, str(path)
    return read_state_dict(path), None, str(path)


def _copy(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[name])


# ---- What does not fit ----------------------------------------------------------------------------------------------
#
# Each function gives lines for the error message; None or an empty list where all is well.


def _raise_if_any(headline: str, problems: Iterable[str | None]) -> None:
    lines = [line for line in problems if line]
    if lines:
        raise CheckpointError("\n  ".join([f"{headline}; nothing was loaded:", *lines]))


def _resize(model: nn.Module, state: dict[str, Any], grid: Grid | None) -> str | None:
    """Replace the state's position table by one for the model's grid, where that is all that differs."""
    key = EMBEDDINGS + "position_embeddings"
    table, embeddings = state.get(key), model.transformer.embeddings
    ours = embeddings.position_embeddings
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.dim() != 3:
        return None
    if (table.shape[0], table.shape[2]) != (ours.shape[0], ours.shape[2]):
        return None
    patches = table.shape[1] - 1
    if grid is None:
        side = math.isqrt(max(patches, 0))
        grid = tuple(embeddings.grid) if table.shape == ours.shape else (side, side)
        if patches < 1 or grid[0] * grid[1] != patches:
            return f"{key}: {patches} patches are no square grid: pass the file's grid=(h, w)"
    elif grid[0] * grid[1] != patches:
        return f"{key}: the file has {patches} patches, a grid of {grid[0]}x{grid[1]} has {grid[0] * grid[1]}"
    if table.dtype in (torch.float16, torch.bfloat16):
        table = table.float()  # rounded once, to the parameter's dtype
    state[key] = resize_position_embeddings(table, grid, tuple(embeddings.grid))
    return None


def _other_heads(model: nn.Module, readers: Mapping[str, Callable[[], Any]]) -> str | None:
    """Google's kernels tell the number of heads; a model with another one would compute something else, shapes being equal."""
    read = readers.get(f"Transformer/encoderblock_0/{ATTENTION}/query/kernel")
    shape = () if read is None else read().shape
    layers = model.transformer.encoder.layer
    if len(shape) != 3 or not len(layers) or shape[1] == layers[0].attn.num_attention_heads:
        return None
    return f"attention: the file has {shape[1]} heads, the model {layers[0].attn.num_attention_heads}"


def _differences(targets: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """Every tensor that is missing, left over, or not what the model needs, equal ones of several blocks on one line."""
    missing = [name for name in targets if name not in state]
    lines = [f"missing: {group}" for group in _grouped(missing)]
    lines += [f"unexpected: {group}" for group in _grouped(str(name) for name in state if name not in targets)]
    unfit: dict[str, list[str]] = {}
    for name in targets:
        if name in state and (reason := _unfit(targets[name], state[name])):
            unfit.setdefault(reason, []).append(name)
    lines += [f"{group}: {reason}" for reason, names in unfit.items() for group in _grouped(names)]
    if any(target.is_meta for target in targets.values()):
        lines.append("the model is on the meta device and has no memory to load into: call model.to_empty(device=...) first")
    return lines + _hints(targets, state)


def _unfit(target: Tensor, value) -> str | None:
    if not isinstance(value, (Tensor, np.ndarray)):
        return f"is a {type(value).__name__}, a tensor is needed"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"is of dtype {str(value.dtype).removeprefix('torch.')}, floating-point numbers are needed"
    if value.layout != torch.strided or value.is_meta:
        return f"is a {'meta' if value.is_meta else 'sparse'} tensor, one with all its values is needed"
    if value.shape != target.shape:
        return f"{list(value.shape)} in the file, {list(target.shape)} in the model"
    return None


def _hints(targets: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    hints = []
    head = HEAD[0]
    if head in targets and head not in state:
        hints.append("hint: the file has no head; pass head='drop' to keep the model's own")
    elif head in targets and isinstance(state[head], Tensor) and state[head].dim() == 2:
        theirs, ours = state[head].shape[0], targets[head].shape[0]
        if theirs != ours:
            hints.append(
                f"hint: the file's head has {theirs} classes, the model's {ours}; build the model with num_classes={theirs},"
                " or pass head='drop' to vit_fast.checkpoints.load to keep the model's own head"
            )
    is_hybrid, file_is_hybrid = (any(str(name).startswith(BACKBONE) for name in names) for names in (targets, state))
    if file_is_hybrid and not is_hybrid:
        hints.append("hint: the file is a hybrid's, with a ResNet before the encoder; the model, a plain ViT, has none")
    elif is_hybrid and not file_is_hybrid:
        hints.append("hint: the model is a hybrid, with a ResNet before the encoder; the file, a plain ViT's, has none")
    return hints


_NUMBERED = re.compile(r"(.*?(?:layer\.|encoderblock_|block\d+[./]unit))(\d+)([./].+)")


def _grouped(names: Iterable[str]) -> list[str]:
    """The names, equal ones of several blocks as one: ``layer.{0-5,7}.{ffn.fc1.bias, ffn.fc2.bias}``."""
    lines: list[str] = []
    blocks: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            blocks.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            lines.append(name)
    parts: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (prefix, rest), numbers in blocks.items():
        parts.setdefault((prefix, tuple(sorted(numbers))), []).append(rest)
    for (prefix, numbers), rests in parts.items():
        tail = rests[0] if len(rests) == 1 else rests[0][0] + "{" + ", ".join(rest[1:] for rest in rests) + "}"
        lines.append(prefix + _ranges(numbers) + tail)
    return lines


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) → ``{0-2,5}``; a single number stays bare."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
