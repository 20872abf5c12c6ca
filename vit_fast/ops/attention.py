r"""Multi-head self-attention from the packed product of queries, keys and values.

.. math:: P = \operatorname{softmax}\left(\frac{q k^\top}{\sqrt d}\right) \qquad o = \operatorname{dropout}(P)\, v

for every image and head. Source: Vaswani et al., Attention Is All You Need (2017), eq. 1; in ViT: Dosovitskiy et al.,
"An Image is Worth 16x16 Words" (2021), appendix A.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_fast import backends, extension
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_tensors
from vit_fast.ops.dropout import check_probability, draw_seeds

PROBS = ("none", "all", "class_token", "head_mean")  # which probabilities are a second result

# ---- Reference ------------------------------------------------------------------------------------------------------


def attention_reference(qkv: Tensor, dropout_p: float, probs: str) -> tuple[Tensor, Tensor | None]:
    """The formula, step by step: product, division by √d, softmax, dropout, product."""
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))  # each [B, H, N, d]
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = scores / math.sqrt(query.shape[-1])
    probabilities = torch.softmax(scores, dim=-1)
    context = torch.matmul(F.dropout(probabilities, dropout_p), value)
    return context.transpose(1, 2).flatten(2), _select(probabilities, probs)


def _select(probabilities: Tensor, probs: str) -> Tensor | None:
    if probs == "none":
        return None
    if probs == "class_token":
        return probabilities[:, :, 0]
    return probabilities.mean(1) if probs == "head_mean" else probabilities


# ---- Stock PyTorch --------------------------------------------------------------------------------------------------


def attention_torch(qkv, dropout_p, probs):
    """``scaled_dot_product_attention`` on strided views of the packed product; nothing is copied on the way in."""
    query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
    scale = 1 / math.sqrt(query.shape[-1])
    if probs in ("none", "class_token"):
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
        probabilities = None
        if probs == "class_token":  # one row of scores a head: cheaper a second time than all rows once
            scores = torch.matmul(query[:, :, :1], key.transpose(-1, -2)) * scale
            probabilities = torch.softmax(scores, dim=-1).squeeze(2)
        return context.transpose(1, 2).flatten(2), probabilities
    probabilities = torch.softmax(torch.matmul(query * scale, key.transpose(-1, -2)), dim=-1)
    context = torch.matmul(F.dropout(probabilities, dropout_p), value)
    return context.transpose(1, 2).flatten(2), _select(probabilities, probs)


# ---- The kernels' boundary: schema, fake, launch --------------------------------------------------------------------

# lse is log Σ exp(scale · q kᵀ) [B, H, N]: float32 for 16-bit inputs, else float64. probabilities is [0] for probs "none".
torch.library.define(
    "vit_fast::attention_fwd",
    "(Tensor qkv, float scale, float dropout_p, Tensor? seed, str probs) -> (Tensor out, Tensor lse, Tensor probabilities)",
)
torch.library.define(
    "vit_fast::attention_bwd",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, float dropout_p, Tensor? seed, str probs, Tensor? dprobs)"
    " -> Tensor dqkv",
)


def _attention_fwd_fake(qkv, scale, dropout_p, seed, probs):
    images, tokens, _, heads, head = qkv.shape
    shapes = {
        "none": (0,),
        "all": (images, heads, tokens, tokens),
        "class_token": (images, heads, tokens),
        "head_mean": (images, tokens, tokens),
    }
    lse = qkv.new_empty((images, heads, tokens), dtype=torch.float32 if qkv.element_size() == 2 else torch.float64)
    return qkv.new_empty((images, tokens, heads * head)), lse, qkv.new_empty(shapes[probs])


def _attention_bwd_fake(dout, qkv, out, lse, scale, dropout_p, seed, probs, dprobs):
    return qkv.new_empty(qkv.shape)


extension.register_fakes(attention_fwd=_attention_fwd_fake, attention_bwd=_attention_bwd_fake)


@torch.library.impl("vit_fast::attention_fwd", "default")
def _(qkv, scale, dropout_p, seed, probs):
    from vit_fast.kernels.attention import attention_fwd

    return attention_fwd(qkv, scale, dropout_p, seed, probs)


@torch.library.impl("vit_fast::attention_bwd", "default")
def _(dout, qkv, out, lse, scale, dropout_p, seed, probs, dprobs):
    from vit_fast.kernels.attention import attention_bwd

    return attention_bwd(dout, qkv, out, lse, scale, dropout_p, seed, probs, dprobs)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Kernels of one namespace (``torch.ops.vit_fast`` or ``torch.ops.vit_fast_cpp``) as a differentiable function."""

    @staticmethod
    def forward(ctx, qkv, scale, dropout_p, seed, probs, kernels):
        out, lse, probabilities = kernels.attention_fwd(qkv, scale, dropout_p, seed, probs)
        ctx.kernels, ctx.scale, ctx.dropout_p, ctx.probs = kernels, scale, dropout_p, probs
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.set_materialize_grads(False)  # zeros for [B, H, N, N] probabilities that no loss has used would cost real time
        return out if probs == "none" else (out, probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dprobs=None):
        qkv, out, lse, seed = ctx.saved_tensors
        if dout is None and dprobs is None:
            return None, None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        dqkv = ctx.kernels.attention_bwd(dout, qkv, out, lse, ctx.scale, ctx.dropout_p, seed, ctx.probs, dprobs)
        return dqkv, None, None, None, None, None


def _with_kernels(kernels):
    def run(qkv, dropout_p, probs):
        if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:  # as the stock operation
            qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
        scale = 1 / math.sqrt(qkv.shape[-1])
        (seed,) = draw_seeds(qkv, 1, dropout_p)
        if torch.is_grad_enabled() and qkv.requires_grad:
            results = _Attention.apply(qkv, scale, dropout_p, seed, probs, kernels)
            return (results, None) if probs == "none" else results
        out, _, probabilities = kernels.attention_fwd(qkv, scale, dropout_p, seed, probs)
        return out, None if probs == "none" else probabilities

    return run


# ---- Implementations ------------------------------------------------------------------------------------------------


def _triton_supports(qkv, dropout_p, probs):
    refused = backends.triton_refuses(qkv)
    if refused is not None:
        return refused
    if qkv.shape[-1] > 256:
        return f"its heads hold at most 256 channels, got {qkv.shape[-1]}"
    return _refuses_last_axis(qkv)


def _refuses_last_axis(qkv):
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        return f"qkv's last axis must be contiguous, got stride {qkv.stride(-1)}"
    return None


def _cpp_supports(qkv, dropout_p, probs):
    reason = extension.refuses(qkv)
    if reason is not None:
        return reason
    if qkv.device.type != "cpu":
        return "its attention is for CPUs: on a GPU that is Triton's"
    if qkv.shape[-1] == 0:
        return "its heads hold at least one channel, got 0"
    if torch.is_autocast_enabled("cpu"):
        reason = extension.refuses_dtype(qkv.device, torch.get_autocast_dtype("cpu"))
    return reason or _refuses_last_axis(qkv)


_attention = Operation(
    "attention",
    {
        "reference": Implementation(attention_reference, backends.anything),
        "torch": Implementation(attention_torch, backends.anything),
        "triton": Implementation(_with_kernels(torch.ops.vit_fast), _triton_supports),
        "cpp": Implementation(_with_kernels(torch.ops.vit_fast_cpp), _cpp_supports, extension.not_worth),
    },
    order=("triton", "cpp", "torch"),
)


def attention(qkv: Tensor, num_heads: int, dropout_p: float = 0.0, return_probs: bool | str = False):
    r"""o = dropout(softmax(q kᵀ / √d)) v for every image and head.

    :param qkv: [B, N, 3, H, d], or the same memory as [B, N, 3·H·d]: B images, N tokens; q, k, v; H heads of size d.
        float32, float16 or bfloat16 (float64 on the stock implementations).
    :param num_heads: H.
    :param dropout_p: probability of dropping a softmax entry, in [0, 1]; drawn from torch's generator. Not for inference.
    :param return_probs: also return softmax probabilities, before dropout: True or ``"all"`` for [B, H, N, N],
        ``"class_token"`` for token 0's row [B, H, N], ``"head_mean"`` for [B, N, N].
    :returns: o as [B, N, H·d]; with ``return_probs`` the pair (o, probabilities). Gradients flow through both.
    :raises ValueError: shapes that do not fit, a probability outside [0, 1]. TypeError: a dtype that does not.
    """
    check_tensors("attention", ("qkv", qkv))
    if qkv.dim() == 3:
        if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
            raise ValueError(f"attention: qkv's last axis must be a multiple of 3·{num_heads} heads, got {list(qkv.shape)}")
        qkv = qkv.unflatten(2, (3, num_heads, qkv.shape[2] // (3 * num_heads)))
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[3] != num_heads:
        raise ValueError(f"attention: qkv must be [B, N, 3, {num_heads}, d] or [B, N, 3·{num_heads}·d], got {list(qkv.shape)}")
    check_probability("attention", "dropout_p", dropout_p)
    probs = {False: "none", True: "all"}.get(return_probs, return_probs)
    if probs not in PROBS:
        raise ValueError(f"attention: return_probs must be False, True or one of {PROBS[1:]}, got {return_probs!r}")
    out, probabilities = _attention(qkv, dropout_p, probs)
    return out if probs == "none" else (out, probabilities)
