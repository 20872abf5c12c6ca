"""Hugging Face transformers' ViT, DeiT, DINOv2 (with and without registers) and the image towers of CLIP and SigLIP.

Versions 4 and 5 call the same layers by other names (``encoder.layer.0.attention.attention.query``,
``layers.0.attention.q_proj``); a part is looked up under every name that it has had. Their outputs hold the same in both:

``hidden_states``  what the first block reads, and what every block gives: the last one before the final norm
``attentions``     the softmax probabilities of every block. Where the source's attention implementation can't give any (sdpa
                   gives ``()``, with a warning), they are given here all the same.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from vit_fast.frozen.description import Architecture, Description, Unsupported
from vit_fast.frozen.families import Request, add
from vit_fast.frozen.families.reading import (
    Block,
    activation,
    expect,
    features_of,
    is_of,
    kind,
    known_class,
    linear,
    norm_eps,
    patch_size,
    read_blocks,
    read_embeddings,
    read_head,
    split_attention,
)

_OUTPUTS = "transformers.modeling_outputs"


@dataclass(frozen=True)
class _Class:
    """One of the classes: where its encoder is, what it makes of the tokens, and what it returns."""

    module: str
    base: str  # the attribute that holds the encoder; "" for the model itself
    pool: str | None
    fields: Mapping[str, str]  # of what it returns: names of outputs by names of fields
    output: str = f"{_OUTPUTS}.ImageClassifierOutput"
    head: str = ""  # the attribute


_VIT, _DEIT, _CLIP, _SIGLIP = (f"transformers.models.{n}.modeling_{n}" for n in ("vit", "deit", "clip", "siglip"))
_DINOV2, _REGISTERS = (f"transformers.models.{n}.modeling_{n}" for n in ("dinov2", "dinov2_with_registers"))
_ENCODED = {"last_hidden_state": "tokens", "pooler_output": "pooled"}
_POOLING = f"{_OUTPUTS}.BaseModelOutputWithPooling"
_LOGITS = {"logits": "logits"}
_BOTH = "class_token_and_patch_mean"
_CLASSES = {
    "ViTModel": _Class(_VIT, "", "class_token", _ENCODED, _POOLING),
    "ViTForImageClassification": _Class(_VIT, "vit", "class_token", _LOGITS, head="classifier"),
    "DeiTModel": _Class(_DEIT, "", "class_token", _ENCODED, _POOLING),
    "DeiTForImageClassification": _Class(_DEIT, "deit", "class_token", _LOGITS, head="classifier"),
    "DeiTForImageClassificationWithTeacher": _Class(
        _DEIT, "deit", "first_two", _LOGITS, f"{_DEIT}.DeiTForImageClassificationWithTeacherOutput", "cls_classifier"
    ),
    "Dinov2Model": _Class(_DINOV2, "", "class_token", _ENCODED, _POOLING),
    "Dinov2ForImageClassification": _Class(_DINOV2, "dinov2", _BOTH, _LOGITS, head="classifier"),
    "Dinov2WithRegistersModel": _Class(_REGISTERS, "", "class_token", _ENCODED, _POOLING),
    "Dinov2WithRegistersForImageClassification": _Class(_REGISTERS, "dinov2_with_registers", _BOTH, _LOGITS, head="classifier"),
    "CLIPVisionModel": _Class(_CLIP, "", "class_token", _ENCODED, _POOLING),
    "CLIPVisionModelWithProjection": _Class(
        _CLIP,
        "vision_model",
        "class_token",
        {"image_embeds": "logits", "last_hidden_state": "tokens"},
        f"{_CLIP}.CLIPVisionModelOutput",
        "visual_projection",
    ),
    "CLIPForImageClassification": _Class(_CLIP, "vision_model", "patch_mean", _LOGITS, head="classifier"),
    "SiglipVisionModel": _Class(_SIGLIP, "", "attention", _ENCODED, _POOLING),
    "SiglipForImageClassification": _Class(_SIGLIP, "vision_model", "patch_mean", _LOGITS, head="classifier"),
}


def reads(model: nn.Module) -> bool:
    return is_of(model, "transformers")


def is_own_hook(hook: Any) -> bool:
    """Whether a forward hook is the one that version 5 leaves on layers that once recorded outputs: alone it does nothing."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def describe(model: nn.Module) -> Description:
    known: dict[str, list[str]] = {}
    for name, its in _CLASSES.items():
        known.setdefault(its.module, []).append(name)
    name = known_class(model, known).__name__
    its = _CLASSES[name]
    # Early releases of this class average the registers with the patches.
    if its.pool == _BOTH and its.module == _REGISTERS and "num_register_tokens" not in _code(model).co_names:
        raise Unsupported(f"freeze: {name} of this release of transformers takes registers for patches; later ones don't")
    base = getattr(model, its.base) if its.base else model
    encoder = getattr(base, "vision_model", base)  # CLIP and SigLIP of version 4 have one level more
    if getattr(encoder.config, "is_causal", None):
        raise Unsupported("freeze: attention is causal (config.is_causal)")

    weights: dict[str, Tensor] = {}
    embeddings = _embeddings_of_towers if its.module in (_CLIP, _SIGLIP) else _embeddings
    image_size, patch, prefix_tokens = embeddings(encoder.embeddings, weights)
    width, channels = weights["patch.weight"].shape[:2]
    fields = read_blocks(weights, [_block(layer, i, its.module) for i, layer in enumerate(_layers(encoder))], width)
    for ours, theirs in _norms(its, name).items():
        module = getattr(encoder, theirs)
        add(weights, ours, module)
        fields[_EPS[ours]] = norm_eps(module, theirs, width)
    pool, pooler, extras = _pool(encoder, its, weights, fields)
    heads = [getattr(model, attribute) for attribute in (its.head, "distillation_classifier") if hasattr(model, attribute)]
    classes = _two_heads(heads, weights) if pool == "first_two" else read_head(weights, heads[0] if heads else None)
    outputs = dict(its.fields)
    if pool is None:
        outputs.pop("pooler_output")
    if not classes:
        outputs = {field: "pooled" if output == "logits" else output for field, output in outputs.items()}

    resize, any_size = _resize(its.module, image_size, patch)
    # Which config says what is returned without being asked for: of the sub-model, if it is a model of theirs.
    config = base.config if hasattr(base, "get_input_embeddings") else model.config
    extras |= {
        "classes": classes,
        "class": name,
        "output": its.output,
        "fields": outputs,
        "parameters": _parameters(model, base),
        "output_hidden_states": bool(getattr(config, "output_hidden_states", False)),
        "output_attentions": bool(getattr(config, "output_attentions", False)),
        "return_dict": bool(getattr(model.config, "return_dict", True)),
    }
    architecture = Architecture(
        family="transformers",
        name=type(model).__name__,
        image_size=image_size,
        channels=channels,
        patch=patch,
        prefix_tokens=prefix_tokens,
        pool=pool,
        pooler=pooler,
        resize=resize,
        any_size=any_size,
        extras=extras,
        **fields,
    )
    return Description(architecture, weights)


# ---- Parts ----------------------------------------------------------------------------------------------------------


def _first(module: nn.Module, where: str, *paths: str) -> Any:
    """What is found under the first of these names that there is."""
    for path in paths:
        try:
            return functools.reduce(getattr, path.split("."), module)
        except AttributeError:
            continue
    raise Unsupported(f"freeze: {where} ({kind(module)}) has none of {', '.join(paths)}")


def _layers(encoder: nn.Module) -> nn.ModuleList:
    return _first(encoder, "the encoder", "layers", "encoder.layers", "encoder.layer")


def _block(layer: nn.Module, i: int, module: str) -> Block:
    where = f"block {i}"
    for part in layer.modules():
        if said := features_of(part):
            raise Unsupported(f"freeze: {where} has {' and '.join(sorted(said))}: {kind(part)}")
    if type(layer).__module__ != module:
        raise Unsupported(f"freeze: {where} is {kind(layer)}, which isn't of {module}")
    # The module with the number of heads is the one that computes the probabilities: in version 4 a level further in.
    attention = _first(layer, where, "attention.attention", "attention", "self_attn")
    if type(attention).__module__ != module:
        raise Unsupported(f"freeze: {where}'s attention is {kind(attention)}, which isn't of {module}")
    return Block(
        norm1=_first(layer, where, "layernorm_before", "layer_norm1", "norm1"),
        qkv=[
            _first(attention, f"{where}'s attention", *names)
            for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
        ],
        out=_first(layer, where, "attention.o_proj", "attention.output.dense", "self_attn.out_proj"),
        heads=_first(attention, f"{where}'s attention", "num_attention_heads", "num_heads"),
        norm2=_first(layer, where, "layernorm_after", "layer_norm2", "norm2"),
        fc1=_first(layer, where, "mlp.fc1", "intermediate.dense"),
        act=_first(layer, where, "mlp.activation_fn", "mlp.activation", "intermediate.intermediate_act_fn"),
        fc2=_first(layer, where, "mlp.fc2", "output.dense"),
        scale1=_layer_scale(layer, "layer_scale1"),
        scale2=_layer_scale(layer, "layer_scale2"),
        scaling=_first(attention, f"{where}'s attention", "scaling", "scale"),
    )


def _layer_scale(layer: nn.Module, name: str) -> Tensor | None:
    module = getattr(layer, name, None)
    return None if module is None else module.lambda1


def _embeddings(embeddings: nn.Module, weights: dict[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Of ViT, DeiT and DINOv2: image size, patch size, number of prefix tokens."""
    patches = embeddings.patch_embeddings
    patch = patch_size(patches.projection, "patch_embeddings.projection")
    add(weights, "patch", patches.projection)
    image_size = tuple(patches.image_size)
    prefix = [embeddings.cls_token]
    if hasattr(embeddings, "distillation_token"):
        prefix.append(embeddings.distillation_token)
    embedded = len(prefix)  # registers come after the positions are added
    if hasattr(embeddings, "register_tokens"):
        prefix.append(embeddings.register_tokens)
    table = embeddings.position_embeddings[0]
    return image_size, patch, read_embeddings(weights, prefix, table, embedded, _grid(image_size, patch))


def _embeddings_of_towers(embeddings: nn.Module, weights: dict[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Of CLIP, with a class token, and of SigLIP, without one."""
    patch = patch_size(embeddings.patch_embedding, "patch_embedding")
    add(weights, "patch", embeddings.patch_embedding)
    image_size = (embeddings.image_size, embeddings.image_size)
    prefix = [embeddings.class_embedding] if hasattr(embeddings, "class_embedding") else []
    table = embeddings.position_embedding.weight
    return image_size, patch, read_embeddings(weights, prefix, table, len(prefix), _grid(image_size, patch))


def _grid(image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    return image_size[0] // patch[0], image_size[1] // patch[1]


_EPS = {"pre_norm": "pre_norm_eps", "norm": "final_norm_eps", "pool_norm": "pool_norm_eps"}


def _norms(its: _Class, name: str) -> dict[str, str]:
    """Our names of the norms outside the blocks, and theirs."""
    if its.module == _SIGLIP:
        return {"norm": "post_layernorm"}
    if its.module != _CLIP:
        return {"norm": "layernorm"}
    if name == "CLIPForImageClassification":
        return {"pre_norm": "pre_layrnorm"}  # it reads the tokens as the last block leaves them
    return {"pre_norm": "pre_layrnorm", "pool_norm": "post_layernorm"}


def _pool(encoder: nn.Module, its: _Class, weights: dict[str, Tensor], fields: dict[str, Any]):
    """The pool, whether the tanh layer comes after it, and what else the pool needs."""
    if its.pool == "attention":
        head = getattr(encoder, "head", None)
        return (None, False, {}) if head is None else ("attention", False, _attention_pool(head, weights, fields))
    if its.base or its.module not in (_VIT, _DEIT):
        return its.pool, False, {}
    if encoder.pooler is None:
        return None, False, {}
    add(weights, "pooler", linear(encoder.pooler.dense, "the pooler"))
    expect(encoder.pooler.activation, "the pooler's activation", nn.Tanh)
    return its.pool, True, {}


def _attention_pool(head: nn.Module, weights: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
    if activation(head.mlp.activation_fn, "the pooling head") != fields["activation"]:
        raise Unsupported(f"freeze: the pooling head's activation is not the blocks' {fields['activation']}")
    weights["pool.probe"] = head.probe.reshape(-1)
    split_attention(weights, head.attention, "the pooling head's attention")
    for name, module in (("fc1", head.mlp.fc1), ("fc2", head.mlp.fc2)):
        add(weights, "pool." + name, linear(module, f"the pooling head's {name}"))
    add(weights, "pool.norm", head.layernorm)
    eps = norm_eps(head.layernorm, "the pooling head's norm", fields["width"])
    return {"pool_heads": head.attention.num_heads, "pool_eps": eps, "pool_from": 0}


def _two_heads(heads: list[nn.Module], weights: dict[str, Tensor]) -> int:
    """The class token's head and the distillation token's, side by side: both logits are returned, and their mean."""
    parts: list[dict[str, Tensor]] = [{}, {}]
    classes = [read_head(w, head) for w, head in zip(parts, heads, strict=True)]
    if classes[0] != classes[1]:
        raise Unsupported(f"freeze: the two heads have different numbers of classes: {classes}")
    if classes[0]:
        weights["head.weight"] = torch.block_diag(*(w["head.weight"] for w in parts))
        weights["head.bias"] = torch.cat([w["head.bias"] for w in parts])
    return sum(classes)


def _resize(module: str, image_size: tuple[int, int], patch: tuple[int, int]) -> tuple[str | None, bool]:
    """The rule for other image sizes, and whether they are taken without being asked for."""
    rows, columns = _grid(image_size, patch)
    always = module in (_DINOV2, _REGISTERS)
    if rows != columns or patch[0] != patch[1]:
        # Their rules take a grid of n positions to be √n × √n.
        if always:
            raise Unsupported(
                f"freeze: the positions are a {rows}×{columns} grid, and the model itself takes them for a square"
            )
        return None, False
    # With registers the table is resized with antialiasing, which is timm's rule.
    return "timm" if module == _REGISTERS else "transformers", always


def _code(model: nn.Module) -> CodeType:
    """Of forward(), without its decorators."""
    return inspect.unwrap(type(model).forward).__code__


def _parameters(model: nn.Module, base: nn.Module) -> list[str]:
    """Names of what forward() takes, in order; they differ between versions."""
    signature = inspect.signature(type(model).forward).parameters
    names = [name for name, p in signature.items() if name != "self" and p.kind is not p.VAR_KEYWORD]
    if base is not model and any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        inner = inspect.signature(type(base).forward).parameters
        names += [name for name in ("interpolate_pos_encoding",) if name in inner and name not in names]
    return names


# ---- Calls ----------------------------------------------------------------------------------------------------------

_ALWAYS = ("output_attentions", "output_hidden_states", "return_dict")


def request(architecture: Architecture, *args: Any, **kwargs: Any) -> Request:
    """As the source's forward(); what changes the computation, such as masks and labels, is refused unless it is None."""
    extras, name = architecture.extras, architecture.name
    known = [*extras["parameters"], *(option for option in _ALWAYS if option not in extras["parameters"])]
    if len(args) > len(extras["parameters"]):
        raise TypeError(f"freeze: {name} takes {len(extras['parameters'])} arguments, got {len(args)}")
    given = dict(zip(known, args, strict=False))
    for option, value in kwargs.items():
        if option in given:
            raise TypeError(f"freeze: {name} got {option} twice")
        if option not in known and value is not None:
            raise TypeError(f"freeze: {name} takes no {option}; it takes {', '.join(known)}")
        given[option] = value
    images = given.pop("pixel_values", None)
    if images is None:
        raise ValueError(f"freeze: {name} needs pixel_values")
    interpolate = bool(given.pop("interpolate_pos_encoding", None))
    if interpolate and architecture.resize is None:
        raise ValueError(f"freeze: {name} can't resize the positions of a grid that isn't square")
    flags = {}
    for option in _ALWAYS:
        value = given.pop(option, None)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"freeze: {option} must be True or False, got {value!r}; ask for single layers with outputs=")
        flags[option] = extras[option] if value is None else value
    refused = [option for option, value in given.items() if value is not None]
    if refused:
        raise ValueError(f"freeze: {name} is frozen without {' and '.join(refused)}")

    names = dict.fromkeys(extras["fields"].values())
    if flags["output_hidden_states"]:
        names |= dict.fromkeys(("embeddings", "layer"))
    if flags["output_attentions"]:
        names["attention"] = None
    wrap = functools.partial(_wrap, extras, flags)
    return Request(images, tuple(names), wrap, any_size=interpolate)


def _wrap(extras: Mapping[str, Any], flags: Mapping[str, bool], found: Mapping[str, Any]) -> Any:
    module, _, name = extras["output"].rpartition(".")
    fields = {field: found[output] for field, output in extras["fields"].items()}
    if extras["class"] == "DeiTForImageClassificationWithTeacher":
        of_class_token, of_distillation_token = fields["logits"].chunk(2, dim=-1)
        fields = {
            "logits": (of_class_token + of_distillation_token) / 2,
            "cls_logits": of_class_token,
            "distillation_logits": of_distillation_token,
        }
    if flags["output_hidden_states"]:
        fields["hidden_states"] = (found["embeddings"], *found["layer"])
    if flags["output_attentions"]:
        fields["attentions"] = tuple(found["attention"])
    output = getattr(importlib.import_module(module), name)(**fields)
    return output if flags["return_dict"] else output.to_tuple()
