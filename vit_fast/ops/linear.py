r"""A linear layer with its epilogue.

.. math:: y = s \, m \circ \operatorname{act}(x W^\top + b) + r

act is nothing, GELU with the exact error function, x·Φ(x) (Hendrycks & Gimpel 2016), or its tanh approximation by name. In
training m is dropout's mask and s stochastic depth's, one number an image, each divided by the share that is kept; neither is
in memory: the kernels draw them from a seed, and draw them again in the backward pass (`vit_fast.kernels.dropout`).
The kernels are for the epilogues: a product with one is theirs, and in `mlp` so is the one that gives the hidden gradient, with
the activation's derivative behind it. A product without is the stock one, cuBLAS, under ``triton`` too: the bare layer, and in
every backward pass dx = dz W and dW = dzᵀ x. On a CPU the extension multiplies too, where it is faster than BLAS.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vit_fast import backends, extension, tuning
from vit_fast.backends import Implementation, Operation
from vit_fast.ops.checks import check_shape, check_tensors, dtype_name, refuses_rows
from vit_fast.ops.dropout import check_probability, draw_seeds, stochastic_depth

ACTIVATIONS = {None: None, "gelu": "none", "gelu_tanh": "tanh"}  # our name: torch.nn.functional.gelu's `approximate`

# ---- References -----------------------------------------------------------------------------------------------------


def linear_reference(x, weight, bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    """The formula, step by step."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate=ACTIVATIONS[activation])
    y = stochastic_depth(F.dropout(y, dropout_p), stochastic_depth_p)
    return y if residual is None else y + residual


# ---- Stock PyTorch --------------------------------------------------------------------------------------------------


def linear_torch(x, weight, bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    """The same with the epilogue computed in place where autograd allows it: fewer fresh pages, less memory."""
    y = _in_blocks(x, weight, bias) if _gains_from_blocks(x, weight, bias) else F.linear(x, weight, bias)
    in_place = not torch.compiler.is_compiling()  # the compiler fuses the epilogue itself
    if activation is not None:
        approximate = ACTIVATIONS[activation]
        # GELU's derivative needs its input, so it can't overwrite it while autograd watches.
        if in_place and not y.requires_grad:
            torch.ops.aten.gelu_(y, approximate=approximate)
        else:
            y = F.gelu(y, approximate=approximate)
    if dropout_p > 0.0 or stochastic_depth_p > 0.0:
        y = stochastic_depth(F.dropout(y, dropout_p), stochastic_depth_p)
        in_place = in_place and not y.requires_grad  # the scaling's derivative
    if residual is None:
        return y
    if in_place and y.dtype == residual.dtype and activation is None:
        return y.add_(residual)  # no derivative needs the sum's inputs
    return y + residual


# On a few cores BLAS is faster at several narrow products than at one wide one. On an AMD EPYC (Zen 3), 2 threads, float32,
# torch 2.13 (MKL), 2026-11-22: 197 rows of 768 by 2,304 columns 5.47 ms whole, 5.08 ms in blocks of 512; by 3,072 columns 8.33
# and 7.34 ms; 1,576 rows 47.1 and 46.2 ms, 67.6 and 65.4 ms. By 1,536 columns of depth 384 nothing is gained. More threads were
# not measured.
_BLOCK_COLUMNS, _WIDE, _FEW_THREADS = 512, 2048, 4


def _gains_from_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.shape[0] < _WIDE or bias is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    # Writing into a part of the result is for plain tensors, outside autograd, autocast, transforms and compilers.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or type(x) is not Tensor:
        return False
    return torch.get_num_threads() <= _FEW_THREADS and not torch._C._are_functorch_transforms_active()


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b, a block of columns at a time."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], _BLOCK_COLUMNS):
        block = slice(start, start + _BLOCK_COLUMNS)
        torch.addmm(bias[block], rows, weight[block].t(), out=y[:, block])
    return y.view(*x.shape[:-1], weight.shape[0])


# ---- The kernels' boundary: schema, fake, launch --------------------------------------------------------------------

torch.library.define(
    "vit_fast::linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, bool keep_preactivation, float dropout_p=0.0,"
    " float stochastic_depth_p=0.0, Tensor? seed=None) -> (Tensor y, Tensor z)",
)
torch.library.define(
    "vit_fast::linear_dgelu_bwd",
    "(Tensor dy, Tensor weight, Tensor z, str activation, float dropout_p=0.0, Tensor? seed=None, bool keep_activation=False)"
    " -> (Tensor dz, Tensor dbias, Tensor h)",
)
torch.library.define(
    "vit_fast::epilogue_bwd",
    "(Tensor dy, Tensor? z, str? activation, float dropout_p=0.0, float stochastic_depth_p=0.0, Tensor? seed=None,"
    " bool keep_activation=False) -> (Tensor dz, Tensor dbias, Tensor h)",
)


def _linear_fwd_fake(
    x, weight, bias, activation, residual, keep_preactivation, dropout_p=0.0, stochastic_depth_p=0.0, seed=None
):
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if keep_preactivation else 0)


def _linear_dgelu_bwd_fake(dy, weight, z, activation, dropout_p=0.0, seed=None, keep_activation=False):
    return z.new_empty(z.shape), z.new_empty(z.shape[-1:]), z.new_empty(z.shape if keep_activation else 0)


def _epilogue_bwd_fake(dy, z, activation, dropout_p=0.0, stochastic_depth_p=0.0, seed=None, keep_activation=False):
    like = dy if z is None else z
    return like.new_empty(dy.shape), like.new_empty(dy.shape[-1:]), like.new_empty(dy.shape if keep_activation else 0)


extension.register_fakes(linear_fwd=_linear_fwd_fake, linear_dgelu_bwd=_linear_dgelu_bwd_fake, epilogue_bwd=_epilogue_bwd_fake)


@torch.library.impl("vit_fast::linear_fwd", "default")
def _(*arguments):
    from vit_fast.kernels.linear import linear_fwd

    return linear_fwd(*arguments)


@torch.library.impl("vit_fast::linear_dgelu_bwd", "default")
def _(*arguments):
    from vit_fast.kernels.linear import linear_dgelu_bwd

    return linear_dgelu_bwd(*arguments)


@torch.library.impl("vit_fast::epilogue_bwd", "default")
def _(*arguments):
    from vit_fast.kernels.epilogue import epilogue_bwd

    return epilogue_bwd(*arguments)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor as a matrix of its last axis."""
    return tensor.reshape(-1, tensor.shape[-1])


class _Linear(torch.autograd.Function):
    """A layer with an epilogue."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation, residual, dropout_p, stochastic_depth_p, seed, kernels):
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        keep = activation is not None and (for_x or for_weight or for_bias)
        y, z = forward_with(kernels, x, weight, bias, activation, residual, keep, dropout_p, stochastic_depth_p, seed)
        ctx.kernels, ctx.dtype, ctx.epilogue = kernels, x.dtype, (activation, dropout_p, stochastic_depth_p)
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None, z if keep else None, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        for_x, for_weight, for_bias, _, for_residual = ctx.needs_input_grad[:5]
        x, weight, z, seed = ctx.saved_tensors
        if z is not None or seed is not None:
            dz, dbias = epilogue_gradient(ctx.kernels, dy, ctx.dtype, z, *ctx.epilogue, seed)
        else:
            dz = dy.to(ctx.dtype)  # from the wider residual's, under autocast
            dbias = rows_of(dz).sum(0) if for_bias else None
        dx = product(ctx.kernels, dz, weight.t()) if for_x else None
        dweight = product(ctx.kernels, rows_of(dz).t(), rows_of(x).t()) if for_weight else None
        return dx, dweight, dbias if for_bias else None, None, dy if for_residual else None, None, None, None, None


def epilogue_gradient(kernels, dy, dtype, z, activation, dropout_p, stochastic_depth_p, seed):
    """(s m ∘ dy ∘ act'(z), its sum over the rows), in that dtype, which is z's."""
    # A gradient comes in any layout, a sum's as one element expanded, and in a wider residual's dtype under autocast.
    dy = dy.contiguous() if z is not None else dy.to(dtype).contiguous()
    return kernels.epilogue_bwd(dy, z, activation, dropout_p, stochastic_depth_p, seed)[:2]


# ---- Bare products ---------------------------------------------------------------------------------------------------


@functools.cache
def _blas_is_slow() -> bool:
    """Whether the extension multiplies float32 faster than BLAS: for torch on x86 that is MKL, whose best code is for Intel's.

    B/16's products on an AMD EPYC (Zen 5), 2 threads, torch 2.13, 2026-11-25, GFLOP/s by MKL and by the extension: 1,576 rows,
    forward 211 to 226 and 343 to 470, dx 219 to 226 and 401 to 473, dW 210 to 216 and 246 to 387; 197 rows, forward 173 to 186
    and 365 to 402, dx 163 to 197 and 334 to 355, dW 115 to 182 and 346 to 380. On a Xeon they are as fast as each other.
    """
    return torch.backends.mkl.is_available() and tuning.cpu_vendor() == "AuthenticAMD"


def multiplies(kernels, x: Tensor) -> bool:
    """Whether the kernels are for a bare product of x, which elsewhere is the stock one."""
    ours = kernels is torch.ops.vit_fast_cpp and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return ours and not torch.compiler.is_compiling() and _blas_is_slow()


def product(kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + r, outside autograd; the weight contiguous along either axis."""
    if multiplies(kernels, x):
        return kernels.linear_fwd(x.contiguous(), weight, bias, None, residual, False)[0]
    y = F.linear(x, weight, bias)
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def forward_with(kernels, x, weight, bias, activation, residual, keep=False, dropout_p=0.0, stochastic_depth_p=0.0, seed=None):
    """``kernels.linear_fwd``, but for deep float32 products on CPUs with a residual alone: BLAS multiplies those faster.

    fc2 of B/16 with a residual, batch 1 and 8: the extension's kernel runs at 0.94 and 0.91 of the stock composition's speed,
    adding in place at 1.01 and 1.00 (Xeon with AVX-512, 2 threads, 2026-11-25).
    """
    deep = weight.shape[1] >= 2 * weight.shape[0] and x.dtype == torch.float32
    on_cpu = x.device.type == "cpu" and kernels is torch.ops.vit_fast_cpp
    if on_cpu and deep and activation is None and seed is None:
        return product(kernels, x, weight, bias, residual), None
    return kernels.linear_fwd(x, weight, bias, activation, residual, keep, dropout_p, stochastic_depth_p, seed)


def product_dtype(x: Tensor) -> torch.dtype:
    """What ``torch.nn.functional.linear`` multiplies in: under autocast its dtype, unless x is float64."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _linear_with_kernels(kernels, products_on: str = ""):
    """``products_on``: the type of device where the kernels serve the bare product too, rather than the stock one."""

    def run(x, weight, bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
        seed = draw_seeds(x, 1, dropout_p, stochastic_depth_p)[0]
        if activation is None and residual is None and seed is None and x.device.type != products_on:
            return F.linear(x, weight, bias)
        dtype = product_dtype(x)  # the residual keeps its own: y promotes, as a sum does
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        if records(x, weight, bias, residual):
            return _Linear.apply(x, weight, bias, activation, residual, dropout_p, stochastic_depth_p, seed, kernels)
        return forward_with(kernels, x, weight, bias, activation, residual, False, dropout_p, stochastic_depth_p, seed)[0]

    return run


# ---- Implementations ------------------------------------------------------------------------------------------------


def _refuses_layer(weight: Tensor, bias: Tensor | None) -> str | None:
    if 0 in weight.shape:
        return f"a weight must have elements, got {list(weight.shape)}"
    if 1 not in weight.stride():
        return f"a weight must be contiguous along one axis, got strides {weight.stride()}"
    if bias is not None and not bias.is_contiguous():
        return f"a bias must be contiguous, got strides {bias.stride()}"
    return None


def refuses_layers(x: Tensor, residual: Tensor | None, *layers: tuple[Tensor, Tensor | None]) -> str | None:
    """Why the kernels can't take operands that lie in memory as these do; None when they can."""
    reasons = (refuses_rows("x", x), refuses_rows("residual", residual), *(_refuses_layer(*layer) for layer in layers))
    return next(filter(None, reasons), None)


def triton_not_worth(x: Tensor, *others) -> str | None:
    """No tensor core multiplies IEEE float32: the product is then most of the time, and the stock one is the best there is."""
    # The public torch.backends.cuda.matmul.allow_tf32 is this, in a form that torch.compile can't trace.
    if product_dtype(x) == torch.float32 and not torch._C._get_cublas_allow_tf32():
        return "under 'auto' it takes float32 only with torch.backends.cuda.matmul.allow_tf32"
    return None


def _linear_triton_supports(x, weight, bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    refused = backends.triton_refuses(x, weight, bias, residual)
    if refused is not None or (activation is None and residual is None and not dropout_p and not stochastic_depth_p):
        return refused
    return refuses_layers(x, residual, (weight, bias))


def _refuses_overlap(name: str, tensor: Tensor) -> str | None:
    """cuBLASLt takes no matrix whose rows lie in one another, as those of an expanded one do."""
    rows = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride != 1]
    inner = tensor.shape[tensor.stride().index(1)] if 1 in tensor.stride() else 1
    if any(stride < inner for _, stride in rows):
        return f"{name}'s rows must not overlap, got shape {list(tensor.shape)}, strides {tensor.stride()}"
    return None


def cpp_refuses_product(x, *weights):
    """On a CPU the kernels multiply themselves, in float32 and bfloat16; on a GPU cuBLASLt does."""
    if x.device.type != "cpu":
        refused = [_refuses_overlap(name, t) for name, t in (("x", x), *(("a weight", weight) for weight in weights))]
        return next(filter(None, refused), None)
    dtype = product_dtype(x)
    if dtype not in extension.DTYPES["cpu"]:
        return f"on a CPU it multiplies in float32 and bfloat16, not in {dtype_name(dtype)}"
    return None


# A tile computes 16 or more of them at once; below that BLAS has better to offer.
_FEWEST_ROWS = 32


def cpp_not_worth(x: Tensor, *others) -> str | None:
    reason = extension.not_worth(x) or extension.product_not_worth(product_dtype(x))
    if reason is None and x.numel() < _FEWEST_ROWS * x.shape[-1]:
        return f"under 'auto' it takes at least {_FEWEST_ROWS} rows"
    return reason


def _linear_cpp_supports(x, weight, bias, activation, residual, dropout_p=0.0, stochastic_depth_p=0.0):
    return (
        extension.refuses(x, weight, bias, residual)
        or refuses_layers(x, residual, (weight, bias))
        or cpp_refuses_product(x, weight)
        or cpp_refuses_dropout(x, dropout_p, stochastic_depth_p)
    )


def cpp_refuses_dropout(x: Tensor, *probabilities: float) -> str | None:
    return "on a GPU it has no dropout: there that is Triton's" if x.device.type != "cpu" and any(probabilities) else None


_linear = Operation(
    "linear",
    {
        "reference": Implementation(linear_reference, backends.anything),
        "torch": Implementation(linear_torch, backends.anything),
        "triton": Implementation(_linear_with_kernels(torch.ops.vit_fast), _linear_triton_supports, triton_not_worth),
        "cpp": Implementation(
            _linear_with_kernels(torch.ops.vit_fast_cpp, products_on="cpu"), _linear_cpp_supports, cpp_not_worth
        ),
    },
    order=("triton", "cpp", "torch"),
)


def check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    stochastic_depth_p: float = 0.0,
) -> Tensor:
    r"""y = s m ∘ act(x Wᵀ + b) + residual.

    :param x: [..., K], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param weight: W, [M, K]; :param bias: b, [M] or None.
    :param activation: None, ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., M], or None.
    :param dropout_p: probability that an element of m is 0; else it is 1/(1 - p). Drawn from torch's generator. For training.
    :param stochastic_depth_p: the same for s, one number for each entry of x's first axis, an image.
    :returns: [..., M] in the inputs' dtype; under autocast as ``torch.nn.functional.linear`` gives it.
    :raises ValueError: shapes or devices that do not fit, an unknown activation, a probability outside [0, 1]. TypeError:
        dtypes that do not fit.
    """
    check_tensors("linear", ("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check_shape("linear", "bias", bias, weight.shape[:1])
    if residual is not None:
        check_shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    check_activation("linear", activation)
    check_probability("linear", "dropout_p", dropout_p)
    check_probability("linear", "stochastic_depth_p", stochastic_depth_p)
    return _linear(x, weight, bias, activation, residual, dropout_p, stochastic_depth_p)
