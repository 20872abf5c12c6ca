"""How the models of other packages are read: what a layer must be to be taken, and how a refusal says what it is.

A class is recognised by its name and its package, so that none of them is imported here. Somebody's subclass of a model is read
as the model if it overrides nothing that forward() is made of; a layer must be of the very class that is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_fast.frozen.description import Unsupported
from vit_fast.frozen.families import add, stacked

# What forward() is made of in these packages: a class that overrides one of them computes something else.
_COMPUTING = ("__call__", "forward", "forward_features", "forward_head", "pool", "_pos_embed", "_process_input")

# Of the class names of a model's parts, and what they are called in a refusal.
_FEATURES = {"rope": "rotary positions", "rotary": "rotary positions", "swiglu": "SwiGLU", "glumlp": "SwiGLU"}


def package(module: nn.Module | type) -> str:
    cls = module if isinstance(module, type) else type(module)
    return cls.__module__.partition(".")[0]


def is_of(model: nn.Module, name: str) -> bool:
    """Whether the model's class, or one that it derives from, is of this package."""
    return any(package(cls) == name for cls in type(model).__mro__)


def kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def known_class(model: nn.Module, known: Mapping[str, Iterable[str]]) -> type:
    """The first class of the model's that is known (class names by module), with nothing overridden on the way there."""
    mro = type(model).__mro__
    found = next((i for i, cls in enumerate(mro) if cls.__qualname__ in known.get(cls.__module__, ())), None)
    if found is None:
        features = sorted({said for module in model.modules() for said in features_of(module)})
        names = ", ".join(name for names in known.values() for name in names)
        reason = f" (it has {' and '.join(features)})" if features else ""
        raise Unsupported(f"freeze: {kind(model)} is not supported{reason}; of its package these are: {names}")
    for cls in mro[:found]:
        for name in _COMPUTING:
            if name in vars(cls):
                raise Unsupported(f"freeze: {cls.__qualname__} overrides {name}() of {mro[found].__qualname__}")
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        # transformers 4 lends forward() to record outputs and puts the bound method back: that is the class's own.
        own = getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
        if forward is not None and not own:
            raise Unsupported(f"freeze: forward() of {name or 'the model'} was replaced on the object")
    return mro[found]


def features_of(module: nn.Module) -> set[str]:
    return {said for part, said in _FEATURES.items() if part in type(module).__name__.lower()}


def expect(module: nn.Module, where: str, expected: type | str, origin: str = "torch") -> None:
    """Refuses a module that isn't of torch's class, or of the class of this name from the package or module of origin."""
    cls = type(module)
    fits = cls is expected or (cls.__name__ == expected and f"{cls.__module__}.".startswith(f"{origin}."))
    if not fits:
        features = features_of(module)
        named = f"{' and '.join(sorted(features))}: {kind(module)}" if features else kind(module)
        wanted = expected if isinstance(expected, str) else f"torch.nn.{expected.__name__}"
        raise Unsupported(f"freeze: {where} is {named}, where {wanted} is expected")


def absent(module: nn.Module | None, where: str, what: str) -> None:
    """Refuses a part that would do something; Identity and a dropout, which does nothing in eval mode, are nothing."""
    if module is not None and type(module) not in (nn.Identity, nn.Dropout):
        raise Unsupported(f"freeze: {where} has {what}: {kind(module)}")


def linear(module: nn.Module, where: str) -> nn.Linear:
    # The other class is that of MultiheadAttention's output projection.
    if type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        expect(module, where, nn.Linear)
    return module


def norm_eps(module: nn.Module, where: str, width: int) -> float:
    """eps of a LayerNorm over the channels."""
    if package(module) != "timm" or type(module).__name__ not in ("LayerNorm", "LayerNormFp32"):
        expect(module, where, nn.LayerNorm)
    if tuple(module.normalized_shape) != (width,):
        raise Unsupported(f"freeze: {where} normalises over {tuple(module.normalized_shape)}, not over the {width} channels")
    return module.eps


def activation(module: nn.Module, where: str) -> str:
    """One of `description.ACTIVATIONS`."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names = {
        "GELU": "gelu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "QuickGELUActivation": "quick_gelu",
    }
    name = names.get(type(module).__name__) if package(module) in ("timm", "transformers") else None
    if name is None:
        raise Unsupported(f"freeze: {where}'s activation is {kind(module)}; GELU, its tanh form and QuickGELU are supported")
    return name


def patch_size(module: nn.Module, where: str) -> tuple[int, int]:
    """Of a convolution that cuts an image into patches."""
    expect(module, where, nn.Conv2d)
    plain = module.stride == module.kernel_size and module.padding in ((0, 0), "valid")
    if not plain or module.dilation != (1, 1) or module.groups != 1:
        raise Unsupported(f"freeze: {where} is {module}, which isn't a cut into patches that neither overlap nor leave gaps")
    return module.kernel_size


@dataclass(frozen=True)
class Block:
    """The parts of one block, whatever its family calls them."""

    norm1: nn.Module
    qkv: Sequence[nn.Module] | nn.MultiheadAttention
    out: nn.Module
    heads: int
    norm2: nn.Module
    fc1: nn.Module
    act: nn.Module
    fc2: nn.Module
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    scaling: float | None = None  # of q·k; None where it is known to be 1/√d


def read_blocks(weights: dict[str, Tensor], blocks: Sequence[Block], width: int) -> dict[str, Any]:
    """Adds the blocks' weights; the fields of `Architecture` that they decide."""
    if not blocks:
        raise Unsupported("freeze: the model has no blocks")
    fields: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        where, name = f"block {i}", f"blocks.{i}."
        eps = {norm_eps(block.norm1, f"{where}'s first norm", width), norm_eps(block.norm2, f"{where}'s second norm", width)}
        if isinstance(block.qkv, nn.MultiheadAttention):
            packed_attention(weights, name + "qkv", block.qkv, f"{where}'s attention")
        elif len(block.qkv) == 1:
            add(weights, name + "qkv", linear(block.qkv[0], f"{where}'s qkv"))
        else:
            stacked(weights, name + "qkv", [linear(layer, f"{where}'s q, k and v") for layer in block.qkv])
        head_size = weights[name + "qkv.weight"].shape[0] // (3 * block.heads)
        if block.scaling is not None and abs(block.scaling * head_size**0.5 - 1) > 1e-6:
            raise Unsupported(f"freeze: {where}'s attention scales by {block.scaling}, not by 1/√{head_size}")
        fc1 = linear(block.fc1, f"{where}'s fc1")
        for part, module in (("norm1", block.norm1), ("norm2", block.norm2), ("fc1", fc1)):
            add(weights, name + part, module)
        add(weights, name + "out", linear(block.out, f"{where}'s output projection"))
        add(weights, name + "fc2", linear(block.fc2, f"{where}'s fc2"))
        for part, scale in (("scale1", block.scale1), ("scale2", block.scale2)):
            if scale is not None:
                weights[name + part] = scale
        if len(eps) != 1:
            raise Unsupported(f"freeze: {where}'s norms have different eps: {sorted(eps)}")
        found = {
            "heads": block.heads,
            "head_size": head_size,
            "mlp_width": fc1.out_features,
            "activation": activation(block.act, where),
            "norm_eps": eps.pop(),
        }
        fields.append(found)
        if found != fields[0]:
            differing = ", ".join(f"{key} {found[key]} and {fields[0][key]}" for key in found if found[key] != fields[0][key])
            raise Unsupported(f"freeze: {where} differs from block 0: {differing}")
    return {"width": width, "depth": len(blocks), **fields[0]}


def packed_attention(weights: dict[str, Tensor], name: str, module: nn.Module, where: str) -> None:
    """torch's own attention layer, which holds q, k and v in one matrix."""
    expect(module, where, nn.MultiheadAttention)
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn or not module.batch_first:
        raise Unsupported(f"freeze: {where} is {module} with options of its own (kdim, vdim, bias_kv, zero_attn, batch_first)")
    weights[name + ".weight"] = module.in_proj_weight
    if module.in_proj_bias is not None:
        weights[name + ".bias"] = module.in_proj_bias


def split_attention(weights: dict[str, Tensor], module: nn.MultiheadAttention, where: str) -> None:
    """The same layer as an attention pool's: the query's part of it apart from the keys' and values'."""
    packed: dict[str, Tensor] = {}
    packed_attention(packed, "qkv", module, where)
    for part, tensor in packed.items():
        weights[part.replace("qkv", "pool.q")], weights[part.replace("qkv", "pool.kv")] = tensor.split(
            (module.embed_dim, 2 * module.embed_dim)
        )
    add(weights, "pool.out", linear(module.out_proj, f"{where}'s output projection"))


def read_embeddings(
    weights: dict[str, Tensor],
    prefix: Sequence[Tensor],
    table: Tensor | None,
    positions_of_prefix: int,
    grid: tuple[int, int],
) -> int:
    """Adds the prefix tokens, each [.., n, D], and the positions [rows, D], of which the first so many are the first tokens'.

    How many prefix tokens there are.
    """
    tokens = torch.cat([token.reshape(-1, token.shape[-1]) for token in prefix]) if prefix else None
    count = 0 if tokens is None else tokens.shape[0]
    if table is not None:
        if table.shape[0] != positions_of_prefix + grid[0] * grid[1]:
            raise Unsupported(
                f"freeze: the position table has {table.shape[0]} rows, but there are {positions_of_prefix} prefix tokens with"
                f" positions and {grid[0]}×{grid[1]} patches"
            )
        if positions_of_prefix:
            first, others = tokens[:positions_of_prefix] + table[:positions_of_prefix], tokens[positions_of_prefix:]
            tokens = torch.cat([first, others])
        weights["positions"] = table[positions_of_prefix:]
    if tokens is not None:
        weights["prefix"] = tokens
    return count


def read_head(weights: dict[str, Tensor], head: nn.Module | None) -> int:
    """Adds the head; its number of classes, 0 for none."""
    if head is None or type(head) is nn.Identity:
        return 0
    add(weights, "head", linear(head, "the head"))
    return head.out_features
