"""Other packages' Vision Transformers, with the weights of one of ours: all of them then must give the same results.

None of the packages is needed; `Missing` says which one isn't there, or why it can't be used.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast.benchmarks.cases import Shape

TIMM = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}
TIMM |= {"L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}


class Missing(Exception):
    """Why a contender can't take part here, in one line."""


def imported(package: str):
    """The package; `Missing` if importing it fails, for whatever reason: its build may not fit this torch."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = (error.name or package).partition(".")[0]
        raise Missing(f"{name} is not installed") from None
    except Exception as error:  # noqa: BLE001  (torchvision's first import runs its operators' registration, which can raise anything)
        raise Missing(f"{package} can't be imported: {' '.join(str(error).split())[:120]}") from None


class Original(nn.Module):
    """jeonsworld/ViT-pytorch's computation in stock operations, on the parameters of a model of ours."""

    def __init__(self, model: nn.Module):
        super().__init__()
        embeddings, encoder = model.transformer.embeddings, model.transformer.encoder
        self.patches, self.cls_token = embeddings.patch_embeddings, embeddings.cls_token
        self.positions = embeddings.position_embeddings
        self.heads = encoder.layer[0].attn.num_attention_heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": _norm(block.attention_norm),
                    "query": block.attn.query,
                    "key": block.attn.key,
                    "value": block.attn.value,
                    "out": block.attn.out,
                    "norm2": _norm(block.ffn_norm),
                    "fc1": block.ffn.fc1,
                    "fc2": block.ffn.fc2,
                }
            )
            for block in encoder.layer
        )
        self.norm, self.head = _norm(encoder.encoder_norm), model.head

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(-1, -2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        for block in self.blocks:
            x = self._attention(block, block["norm1"](x)) + x
            x = block["fc2"](F.gelu(block["fc1"](block["norm2"](x)))) + x
        return self.head(self.norm(x)[:, 0])

    def _attention(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads)
        query, key, value = (block[part](x).view(shape).permute(0, 2, 1, 3) for part in ("query", "key", "value"))
        scores = torch.matmul(query, key.transpose(-1, -2)) / shape[-1] ** 0.5
        context = torch.matmul(torch.softmax(scores, dim=-1), value)
        return block["out"](context.permute(0, 2, 1, 3).reshape(x.shape))


def _norm(norm: nn.Module) -> nn.LayerNorm:
    """A stock LayerNorm on the same parameters."""
    stock = nn.LayerNorm(norm.weight.shape[0], eps=1e-6, device="meta")
    stock.weight, stock.bias = norm.weight, norm.bias
    return stock


# ---- Other packages -------------------------------------------------------------------------------------------------

_OURS = {"norm1": "attention_norm", "norm2": "ffn_norm", "out": "attn.out", "fc1": "ffn.fc1", "fc2": "ffn.fc2"}


def _renamed(model: nn.Module, names: Mapping[str, str], block: str, parts: Mapping[str, str], qkv: str | None) -> dict:
    """Our state dict under another package's names.

    :param names: of what stands outside the blocks, ours to theirs. :param block: theirs, with the number to fill in.
    :param parts: within a block, theirs by the keys of `_OURS`, and of query, key and value where ``qkv`` is None.
    :param qkv: the name of the three in one, with the parameter's kind to fill in.
    """
    state = model.state_dict()
    found = {theirs: state[ours] for ours, theirs in names.items()}
    for i in range(len(model.transformer.encoder.layer)):
        ours, theirs = f"transformer.encoder.layer.{i}.", block.format(i)
        for kind in ("weight", "bias"):
            for part, name in _OURS.items():
                found[f"{theirs}{parts[part]}.{kind}"] = state[f"{ours}{name}.{kind}"]
            three = [state[f"{ours}attn.{part}.{kind}"] for part in ("query", "key", "value")]
            if qkv is not None:
                found[theirs + qkv.format(kind)] = torch.cat(three)
            else:
                found |= {f"{theirs}{parts[p]}.{kind}": t for p, t in zip(("query", "key", "value"), three, strict=True)}
    return found


def _outside(prefix: str, cls_token: str, positions: str, patches: str, norm: str, head: str) -> dict[str, str]:
    ours = "transformer.embeddings."
    return {
        f"{ours}cls_token": prefix + cls_token,
        f"{ours}position_embeddings": prefix + positions,
        **{f"{ours}patch_embeddings.{kind}": f"{prefix}{patches}.{kind}" for kind in ("weight", "bias")},
        **{f"transformer.encoder.encoder_norm.{kind}": f"{prefix}{norm}.{kind}" for kind in ("weight", "bias")},
        **{f"head.{kind}": f"{head}.{kind}" for kind in ("weight", "bias")},
    }


def _like(model: nn.Module, net: nn.Module, state: dict) -> nn.Module:
    example = next(model.parameters())
    net.load_state_dict(state)
    return net.to(example.device, example.dtype).train(model.training)


def timm(model: nn.Module, shape: Shape) -> nn.Module:
    package = imported("timm")
    if shape.model not in TIMM:
        raise Missing(f"timm has no counterpart of ViT-{shape.model}")
    net = package.create_model(TIMM[shape.model], img_size=shape.image, num_classes=model.num_classes, depth=shape.layers)
    names = _outside("", "cls_token", "pos_embed", "patch_embed.proj", "norm", "head")
    parts = {"norm1": "norm1", "norm2": "norm2", "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return _like(model, net, _renamed(model, names, "blocks.{}.", parts, "attn.qkv.{}"))


def torchvision(model: nn.Module, shape: Shape) -> nn.Module:
    package = imported("torchvision.models.vision_transformer")
    net = package.VisionTransformer(
        shape.image, shape.patch, shape.layers, shape.heads, shape.width, shape.hidden, num_classes=model.num_classes
    )
    names = _outside("", "class_token", "encoder.pos_embedding", "conv_proj", "encoder.ln", "heads.head")
    parts = {"norm1": "ln_1", "norm2": "ln_2", "out": "self_attention.out_proj", "fc1": "mlp.0", "fc2": "mlp.3"}
    block = "encoder.layers.encoder_layer_{}."
    return _like(model, net, _renamed(model, names, block, parts, "self_attention.in_proj_{}"))


class _Logits(nn.Module):
    """A transformers model as a function of images that returns logits."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(pixel_values=images).logits


def transformers(model: nn.Module, shape: Shape) -> nn.Module:
    package = imported("transformers")
    config = package.ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        image_size=shape.image,
        patch_size=shape.patch,
        num_labels=model.num_classes,
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    try:
        net = package.ViTForImageClassification(config)
    except Exception as error:  # noqa: BLE001  (it imports half of the package lazily, torchvision among it)
        raise Missing(f"transformers' ViT can't be made: {' '.join(str(error).split())[:120]}") from None
    patches = "embeddings.patch_embeddings.projection"
    names = _outside("vit.", "embeddings.cls_token", "embeddings.position_embeddings", patches, "layernorm", "classifier")
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    if int(package.__version__.partition(".")[0]) >= 5:
        block = "vit.layers.{}."
        parts |= {"query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj"}
        parts |= {"out": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    else:
        block = "vit.encoder.layer.{}."
        parts |= {part: f"attention.attention.{part}" for part in ("query", "key", "value")}
        parts |= {"out": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
    return _Logits(_like(model, net, _renamed(model, names, block, parts, None)))


# ---- Other runtimes, on CPUs ----------------------------------------------------------------------------------------


def onnxruntime(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The original's computation exported to ONNX, in an ONNX Runtime session with as many threads as torch."""
    package = imported("onnxruntime")
    imported("onnx")
    if example.dtype != torch.float32:
        raise Missing("its CPU kernels are for float32")
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "vit.onnx"))
        try:
            # The exporter that traces: the newer one needs a package more.
            torch.onnx.export(Original(model).eval(), (example,), file, dynamo=False, input_names=["images"])
        except Exception as error:  # noqa: BLE001
            raise Missing(f"torch can't export to ONNX here: {' '.join(str(error).split())[:120]}") from None
        session = package.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The original's computation converted to OpenVINO, compiled for latency in the tensors' dtype, on torch's threads."""
    package = imported("openvino")
    if example.dtype not in (torch.float32, torch.bfloat16):
        raise Missing("its CPU kernels are for float32 and bfloat16")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[example.dtype]
    wide = Original(model).eval()
    if example.dtype != torch.float32:
        import copy

        wide = copy.deepcopy(wide).float()
    try:
        converted = package.convert_model(wide, example_input=example.float(), input=[tuple(example.shape)])
    except Exception as error:  # noqa: BLE001
        raise Missing(f"OpenVINO can't convert it: {' '.join(str(error).split())[:120]}") from None
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = package.Core().compile_model(converted, "CPU", hints).create_infer_request()

    def run(images: Tensor) -> Tensor:
        found = request.infer([images.float().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(found.values()))).to(images.dtype)

    return run
