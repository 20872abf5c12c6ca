r"""Google's .npz files, of vision_transformer and of big_vision, as state dicts with this package's keys, and back.

Google's names and layouts::

    cls [1,1,D]   embedding/{kernel [P,P,C,D], bias}   Transformer/posembed_input/pos_embedding [1,1+h·w,D]
    Transformer/encoderblock_{i}/…                     Transformer/encoder_norm/{scale, bias}   head/{kernel [D,classes], bias}
        LayerNorm_0, LayerNorm_2 {scale, bias}         MlpBlock_3/{Dense_0, Dense_1}/{kernel [in,out], bias}
        MultiHeadDotProductAttention_1/{query, key, value}/{kernel [D,H,d], bias [H,d]}   …/out/{kernel [H,d,D], bias}
    conv_root/kernel   gn_root/{scale, bias}           hybrids only; convolution kernels are [height,width,in,out]
    block{b}/unit{u}/{conv1, conv2, conv3, conv_proj}/kernel   …/{gn1, gn2, gn3, gn_proj}/{scale, bias}

What big_vision's files have instead, all of it understood: MultiHeadDotProductAttention_0, LayerNorm_1 and MlpBlock_0; the
blocks stacked along a first axis under ``Transformer/encoderblock``; the table as ``pos_embedding`` or
``Transformer/pos_embedding``, without a row for the class token where the class token joins after the positions are added (its
row is zero here); names below ``params/``, ``opt/target/`` or, in two-tower models, ``img/``, beside optimizer state or another
tower, which are left out; bfloat16, which numpy stores as two-byte voids.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class CheckpointError(ValueError):
    """Weights that can't be read, or do not fit the model. The model is as it was before."""


# ---- The names of Google's files ------------------------------------------------------------------------------------
#
# Each table maps a key of ours to (Google's name, layout). A layout is a pair of functions on tensors, from Google's and back;
# the second is given the number of heads. A tensor with the wrong number of axes passes unchanged: `load` reports its shape.


def _when(axes: Iterable[int], function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: function(t) if t.dim() in axes else t


_SAME = (lambda t: t, lambda t, heads: t)
_VECTOR = (lambda t: t.reshape(-1), lambda t, heads: t)  # group norms have [1,1,1,C] in old files
_CONV = (_when((4,), lambda t: t.permute(3, 2, 0, 1)), lambda t, heads: t.permute(2, 3, 1, 0))
_DENSE = (_when((2,), lambda t: t.T), lambda t, heads: t.T)
_TO_HEADS = (_when((2, 3), lambda t: t.reshape(t.shape[0], -1).T), lambda t, heads: t.T.unflatten(1, (heads, -1)))
_FROM_HEADS = (_when((2, 3), lambda t: t.reshape(-1, t.shape[-1]).T), lambda t, heads: t.T.unflatten(0, (heads, -1)))
_HEADS_BIAS = (lambda t: t.reshape(-1), lambda t, heads: t.unflatten(0, (heads, -1)))

ATTENTION = "MultiHeadDotProductAttention_1"
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def _norm(ours: str, google: str) -> dict:
    return {f"{ours}.weight": (f"{google}/scale", _VECTOR), f"{ours}.bias": (f"{google}/bias", _VECTOR)}


def _affine(ours: str, google: str, kernel, bias=_VECTOR) -> dict:
    return {f"{ours}.weight": (f"{google}/kernel", kernel), f"{ours}.bias": (f"{google}/bias", bias)}


_BLOCK = {
    **_norm("attention_norm", "LayerNorm_0"),
    **_affine("attn.query", f"{ATTENTION}/query", _TO_HEADS, _HEADS_BIAS),
    **_affine("attn.key", f"{ATTENTION}/key", _TO_HEADS, _HEADS_BIAS),
    **_affine("attn.value", f"{ATTENTION}/value", _TO_HEADS, _HEADS_BIAS),
    **_affine("attn.out", f"{ATTENTION}/out", _FROM_HEADS),
    **_norm("ffn_norm", "LayerNorm_2"),
    **_affine("ffn.fc1", "MlpBlock_3/Dense_0", _DENSE),
    **_affine("ffn.fc2", "MlpBlock_3/Dense_1", _DENSE),
}
_UNIT = {
    **{f"conv{i}.weight": (f"conv{i}/kernel", _CONV) for i in (1, 2, 3)},
    **_norm("gn1", "gn1"),
    **_norm("gn2", "gn2"),
    **_norm("gn3", "gn3"),
    "downsample.weight": ("conv_proj/kernel", _CONV),
    **_norm("gn_proj", "gn_proj"),
}
EMBEDDINGS = "transformer.embeddings."
BACKBONE = EMBEDDINGS + "hybrid_model."
HEAD = ("head.weight", "head.bias")
_REST = {
    EMBEDDINGS + "cls_token": ("cls", _SAME),
    EMBEDDINGS + "position_embeddings": (_POSITIONS, _SAME),
    **_affine(EMBEDDINGS + "patch_embeddings", "embedding", _CONV),
    **_norm("transformer.encoder.encoder_norm", "Transformer/encoder_norm"),
    **_affine("head", "head", _DENSE),
    BACKBONE + "root.conv.weight": ("conv_root/kernel", _CONV),
    **_norm(BACKBONE + "root.gn", "gn_root"),
}


def _inverse(table: dict) -> dict:
    return {google: (ours, layout) for ours, (google, layout) in table.items()}


_FROM_BLOCK, _FROM_UNIT, _FROM_REST = map(_inverse, (_BLOCK, _UNIT, _REST))


def _our_key(google: str) -> tuple[str, tuple] | None:
    """Our key and the layout of the array with this name; None for a name that has no counterpart."""
    if google in _FROM_REST:
        return _FROM_REST[google]
    if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", google):
        table, prefix = _FROM_BLOCK, f"transformer.encoder.layer.{match[1]}."
    elif match := re.fullmatch(r"(block\d+)/(unit\d+)/(.+)", google):
        table, prefix = _FROM_UNIT, f"{BACKBONE}body.{match[1]}.{match[2]}."
    else:
        return None
    ours, layout = table.get(match[match.lastindex], (None, None))
    return None if ours is None else (prefix + ours, layout)


def _google_name(ours: str) -> tuple[str, tuple] | None:
    """The inverse of `_our_key`."""
    if ours in _REST:
        return _REST[ours]
    if match := re.fullmatch(r"transformer\.encoder\.layer\.(\d+)\.(.+)", ours):
        table, prefix = _BLOCK, f"Transformer/encoderblock_{match[1]}/"
    elif match := re.fullmatch(re.escape(BACKBONE) + r"body\.(block\d+)\.(unit\d+)\.(.+)", ours):
        table, prefix = _UNIT, f"{match[1]}/{match[2]}/"
    else:
        return None
    google, layout = table.get(match[match.lastindex], (None, None))
    return None if google is None else (prefix + google, layout)


# ---- Google's arrays, whatever wrote them ---------------------------------------------------------------------------


def _reader(arrays: Mapping, key) -> Callable[[], Any]:
    def read():
        try:
            array = arrays[key]
        except ValueError as error:  # np.load's mapping, asked for an array of Python objects
            raise CheckpointError(f"{key} can't be read: {error}") from None
        return array if isinstance(array, Tensor) else _as_torch_knows_it(np.asarray(array))

    return read


def _as_torch_knows_it(array: np.ndarray) -> np.ndarray:
    """The same values in a dtype that torch has, where there is one."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
        # bfloat16 is the upper half of a float32; numpy has no name for it, so the widened value is exact.
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def canonical(arrays: Mapping) -> dict[str, Callable[[], Any]]:
    """The original's name → a function that reads the array, for files by Google's vision_transformer and big_vision.

    Reading is put off because a lazily read file (``np.load``) reads an array again each time it is asked for.
    """
    names = {str(name): name for name in arrays}
    for prefix in ("params/", "opt/target/", "img/"):
        if any(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}
    readers: dict[str, Callable[[], Any]] = {}
    for name, key in names.items():
        read = _reader(arrays, key)
        if name.startswith("pre_logits/"):
            continue
        if name.startswith("Transformer/encoderblock/"):
            stack, rest = read(), _as_original(name.removeprefix("Transformer/encoderblock/"))
            for i in range(stack.shape[0] if stack.ndim else 0):
                readers[f"Transformer/encoderblock_{i}/{rest}"] = lambda stack=stack, i=i: stack[i]
        elif match := re.fullmatch(r"(Transformer/encoderblock_\d+/)(.+)", name):
            readers[match[1] + _as_original(match[2])] = read
        elif name in ("pos_embedding", "Transformer/pos_embedding"):
            readers["pos_embedding"] = read
        else:
            readers[name] = read
    return readers


def _as_original(name: str) -> str:
    """A name inside a block, as the original has it: there layers are numbered across kinds, in big_vision within each."""
    for big_vision, original in (
        ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),
        ("LayerNorm_1/", "LayerNorm_2/"),
        ("MlpBlock_0/", "MlpBlock_3/"),
    ):
        if name.startswith(big_vision):
            return original + name.removeprefix(big_vision)
    return name


def _with_class_row(table, grid: Grid | None):
    """big_vision's position table with a zero row for the class token, unless it has that row: its length tells."""
    if not isinstance(table, Tensor) or table.dim() != 3:
        return table
    rows = table.shape[1]
    for h, w in ([grid] if grid else []) + [(math.isqrt(rows),) * 2]:
        if rows == h * w:
            return F.pad(table, (0, 0, 1, 0))
        if rows == h * w + 1:
            return table
    raise CheckpointError(
        f"pos_embedding has {rows} rows, no square grid of patches with or without a class token: pass grid=(h, w)"
    )


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The file's arrays, as they are."""
    path = existing_file(path)
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not an .npz file, or it is damaged ({error})") from None
    if isinstance(file, np.ndarray):
        raise CheckpointError(f"{path} holds a single array (.npy), not the named arrays of an .npz file")
    with file:
        arrays, refused = {}, []
        for name in file.files:
            try:
                arrays[name] = file[name]
            except ValueError:  # an object array; everything else that can be wrong with an entry is one of those below
                refused.append(name)
            except (EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
                raise CheckpointError(f"{path} is damaged: {name} can't be read ({error})") from None
    if refused:
        raise CheckpointError(
            f"{path} holds pickled Python objects, which are not loaded since unpickling runs code: {', '.join(refused)}"
        )
    return arrays


def load_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """A Google or big_vision .npz file as a dict of arrays, named as the original expects them (see the module's docstring).

    bfloat16 arrays come out as float32, which holds the same values. big_vision's position table is always named
    ``pos_embedding`` and keeps its layout.

    :raises CheckpointError: no .npz file, a damaged one, or one with pickled Python objects, which are never loaded.
    :raises OSError: a file that is missing or can't be read.
    """
    return {name: read() for name, read in canonical(read_npz(path)).items()}


def from_google(arrays: Mapping, *, grid: Grid | None = None) -> dict[str, Any]:
    """Google's arrays, named and laid out as any file in the module's docstring, as a state dict with this package's keys.

    :param arrays: name → array; what ``np.load`` or `load_npz` gives. Values keep their dtype.
    :param grid: (h, w) of the position table; needed for a table of big_vision that is not square.
    :returns: key → tensor. What has no counterpart keeps its name; values that are not numbers stay as they are. `load` refuses
        both. ``pre_logits/…`` is left out.
    :raises CheckpointError: a table whose grid can't be told, or a mapping that refuses to read a pickled array.
    """
    return from_readers(canonical(arrays), grid)


def from_readers(readers: Mapping[str, Callable[[], Any]], grid: Grid | None) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, read in readers.items():
        value = _tensor(read())
        if name == "pos_embedding":
            name, value = _POSITIONS, _with_class_row(value, grid)
        known = _our_key(name)
        if known is None:
            state[name] = value
        else:
            ours, (from_theirs, _) = known
            state[ours] = from_theirs(value) if isinstance(value, Tensor) else value
    return state


def _tensor(value) -> Any:
    if isinstance(value, Tensor):
        return value
    if not value.flags.writeable or min(value.strides, default=0) < 0:  # torch warns of the first, refuses the second
        value = value.copy()
    try:
        return torch.from_numpy(value)
    except TypeError:  # text, objects, structures, …
        return value


def to_google(model: nn.Module | Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_google`, in the original's names and layouts, float32: ``np.savez(path, **to_google(model))``.

    :param model: a VisionTransformer, or its state dict; with a state dict ``num_heads`` must be given.
    :raises ValueError: no number of heads. KeyError: a key that Google's files have no name for.
    """
    if isinstance(model, nn.Module):
        model = bare_model(model)
        num_heads = num_heads or model.transformer.encoder.layer[0].attn.num_attention_heads
        model = model.state_dict()
    if num_heads is None:
        raise ValueError("to_google: a state dict does not tell the number of heads, pass num_heads")
    arrays = {}
    for ours, tensor in model.items():
        known = _google_name(ours)
        if known is None:
            raise KeyError(f"to_google: Google's files have no name for {ours}")
        google, (_, to_theirs) = known
        arrays[google] = np.ascontiguousarray(to_theirs(tensor.detach().float().cpu(), num_heads).numpy())
    return arrays


# ---- Small pieces that checkpoints.py shares ------------------------------------------------------------------------


def existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file with weights is needed")
    return path


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile's wrappers."""
    while set(model._modules) in ({"module"}, {"_orig_mod"}):
        (model,) = model._modules.values()
    return model
