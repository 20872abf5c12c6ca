r"""A linear layer with its epilogue, and the two of them that make ViT's MLP.

.. math::

    y = \operatorname{act}(x W^\top + b) + r \qquad
    \operatorname{mlp}(x) = \operatorname{act}(x W_1^\top + b_1) W_2^\top + b_2 + r

act is nothing, GELU with the exact error function, x·Φ(x) (Hendrycks & Gimpel 2016), or its tanh approximation by name.
The kernels are for the epilogues: a product with an activation or a residual is theirs, and so is the one that gives the hidden
gradient of the MLP, with the activation's derivative behind it. A product without either is the stock one, cuBLAS, under
``triton`` too: the layer without activation and residual, and in every backward pass dx = dz W and dW = dzᵀ x. On a CPU the
extension multiplies too, where it is faster than BLAS.
Source of the MLP: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), eq. 3 and section 3.1.
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

ACTIVATIONS = {None: None, "gelu": "none", "gelu_tanh": "tanh"}  # our name: torch.nn.functional.gelu's `approximate`

# ---- References -----------------------------------------------------------------------------------------------------


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None):
    """The formula, step by step."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate=ACTIVATIONS[activation])
    return y if residual is None else y + residual


def mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    """The formula, step by step."""
    hidden = linear_reference(x, fc1_weight, fc1_bias, activation, None)
    return linear_reference(hidden, fc2_weight, fc2_bias, None, residual)


# ---- Stock PyTorch --------------------------------------------------------------------------------------------------


def linear_torch(x, weight, bias, activation, residual):
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


def mlp_torch(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    hidden = linear_torch(x, fc1_weight, fc1_bias, activation, None)
    return linear_torch(hidden, fc2_weight, fc2_bias, None, residual)


# ---- The kernels' boundary: schema, fake, launch --------------------------------------------------------------------

torch.library.define(
    "vit_fast::linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, bool keep_preactivation)"
    " -> (Tensor y, Tensor z)",
)
torch.library.define(
    "vit_fast::linear_dgelu_bwd", "(Tensor dy, Tensor weight, Tensor z, str activation) -> (Tensor dz, Tensor dbias)"
)
torch.library.define("vit_fast::gelu_bwd", "(Tensor dy, Tensor z, str activation) -> (Tensor dz, Tensor dbias)")


def _linear_fwd_fake(x, weight, bias, activation, residual, keep_preactivation):
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if keep_preactivation else 0)


def _linear_dgelu_bwd_fake(dy, weight, z, activation):
    return z.new_empty(z.shape), z.new_empty(z.shape[-1:])


def _gelu_bwd_fake(dy, z, activation):
    return z.new_empty(z.shape), z.new_empty(z.shape[-1:])


extension.register_fakes(linear_fwd=_linear_fwd_fake, linear_dgelu_bwd=_linear_dgelu_bwd_fake, gelu_bwd=_gelu_bwd_fake)


@torch.library.impl("vit_fast::linear_fwd", "default")
def _(x, weight, bias, activation, residual, keep_preactivation):
    from vit_fast.kernels.linear import linear_fwd

    return linear_fwd(x, weight, bias, activation, residual, keep_preactivation)


@torch.library.impl("vit_fast::linear_dgelu_bwd", "default")
def _(dy, weight, z, activation):
    from vit_fast.kernels.linear import linear_dgelu_bwd

    return linear_dgelu_bwd(dy, weight, z, activation)


@torch.library.impl("vit_fast::gelu_bwd", "default")
def _(dy, z, activation):
    from vit_fast.kernels.gelu import gelu_bwd

    return gelu_bwd(dy, z, activation)


# ---- Autograd around the kernels ------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _Linear(torch.autograd.Function):
    """A layer with an activation, a residual, or both."""

    @staticmethod
    def forward(ctx, x, weight, bias, activation, residual, kernels):
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        keep = activation is not None and (for_x or for_weight or for_bias)
        y, z = _forward(kernels, x, weight, bias, activation, residual, keep)
        ctx.kernels, ctx.activation, ctx.dtype = kernels, activation, x.dtype
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None, z if keep else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        for_x, for_weight, for_bias, _, for_residual, _ = ctx.needs_input_grad
        x, weight, z = ctx.saved_tensors
        if z is not None:
            # A gradient comes in any layout, a sum's as one element expanded; the kernel reads it beside z.
            dz, dbias = ctx.kernels.gelu_bwd(dy.contiguous(), z, ctx.activation)
        else:
            dz = dy.to(ctx.dtype)  # from the wider residual's, under autocast
            dbias = _rows(dz).sum(0) if for_bias else None
        dx = _product(ctx.kernels, dz, weight.t()) if for_x else None
        dweight = _product(ctx.kernels, _rows(dz).t(), _rows(x).t()) if for_weight else None
        return dx, dweight, dbias if for_bias else None, None, dy if for_residual else None, None


class _Mlp(torch.autograd.Function):
    """Keeps z and h = act(z), as the stock composition does.

    The forward pass has to write h, for the second product to read; recomputing it for dW₂ would write and read it once more.
    """

    @staticmethod
    def forward(ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual, kernels):
        for_x, for_weight1, for_bias1, for_weight2 = ctx.needs_input_grad[:4]
        keep = for_x or for_weight1 or for_bias1
        h, z = kernels.linear_fwd(x, fc1_weight, fc1_bias, activation, None, keep)
        y = _second_layer(h, fc2_weight, fc2_bias, residual, kernels)
        ctx.kernels, ctx.activation, ctx.dtype = kernels, activation, x.dtype
        ctx.save_for_backward(
            x if for_weight1 else None,
            fc1_weight if for_x else None,
            fc2_weight if keep else None,
            z if keep else None,
            h if for_weight2 else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        for_x, for_weight1, for_bias1, for_weight2, for_bias2, _, for_residual, _ = ctx.needs_input_grad
        x, fc1_weight, fc2_weight, z, h = ctx.saved_tensors
        # From the wider residual's dtype, under autocast; and it comes in any layout, a sum's as one element expanded.
        dout = dy.to(ctx.dtype).contiguous()
        dz = dbias1 = None
        if z is not None:
            dz, dbias1 = _hidden_gradient(ctx.kernels, dout, fc2_weight, z, ctx.activation)
        return (
            _product(ctx.kernels, dz, fc1_weight.t()) if for_x else None,
            _product(ctx.kernels, _rows(dz).t(), _rows(x).t()) if for_weight1 else None,
            dbias1 if for_bias1 else None,
            _product(ctx.kernels, _rows(dout).t(), _rows(h).t()) if for_weight2 else None,
            _rows(dout).sum(0) if for_bias2 else None,
            None,
            dy if for_residual else None,
            None,
        )


# ---- Bare products ---------------------------------------------------------------------------------------------------


@functools.cache
def _blas_is_slow() -> bool:
    """Whether the extension multiplies float32 faster than BLAS: for torch on x86 that is MKL, whose best code is for Intel's.

    B/16's products on an AMD EPYC (Zen 5), 2 threads, torch 2.13, 2026-11-25, GFLOP/s by MKL and by the extension: 1,576 rows,
    forward 211 to 226 and 343 to 470, dx 219 to 226 and 401 to 473, dW 210 to 216 and 246 to 387; 197 rows, forward 173 to 186
    and 365 to 402, dx 163 to 197 and 334 to 355, dW 115 to 182 and 346 to 380. On a Xeon they are as fast as each other.
    """
    return torch.backends.mkl.is_available() and tuning.cpu_vendor() == "AuthenticAMD"


def _multiplies(kernels, x: Tensor) -> bool:
    """Whether the kernels are for a bare product of x, which elsewhere is the stock one."""
    ours = kernels is torch.ops.vit_fast_cpp and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return ours and not torch.compiler.is_compiling() and _blas_is_slow()


def _product(kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + r, outside autograd; the weight contiguous along either axis."""
    if _multiplies(kernels, x):
        return kernels.linear_fwd(x.contiguous(), weight, bias, None, residual, False)[0]
    y = F.linear(x, weight, bias)
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


def _forward(kernels, x, weight, bias, activation, residual, keep=False):
    """``kernels.linear_fwd``, but for deep float32 products on CPUs without an activation: BLAS multiplies those faster.

    fc2 of B/16 with a residual, batch 1 and 8: the extension's kernel runs at 0.94 and 0.91 of the stock composition's speed,
    adding in place at 1.01 and 1.00 (Xeon with AVX-512, 2 threads, 2026-11-25).
    """
    deep = weight.shape[1] >= 2 * weight.shape[0] and x.dtype == torch.float32
    if x.device.type == "cpu" and kernels is torch.ops.vit_fast_cpp and deep and activation is None:
        return _product(kernels, x, weight, bias, residual), None
    return kernels.linear_fwd(x, weight, bias, activation, residual, keep)


def _second_layer(h, weight, bias, residual, kernels):
    if residual is None:
        return _product(kernels, h, weight, bias)
    return _forward(kernels, h, weight, bias, None, residual)[0]


def _hidden_gradient(kernels, dout, fc2_weight, z, activation):
    """(dout W₂ act'(z), its sum over the rows)."""
    if _multiplies(kernels, dout):
        return kernels.gelu_bwd(_product(kernels, dout, fc2_weight.t()), z, activation)
    return kernels.linear_dgelu_bwd(dout, fc2_weight, z, activation)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What ``torch.nn.functional.linear`` multiplies in: under autocast its dtype, unless x is float64."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _linear_with_kernels(kernels, products_on: str = ""):
    """``products_on``: the type of device where the kernels serve the bare product too, rather than the stock one."""

    def run(x, weight, bias, activation, residual):
        if activation is None and residual is None and x.device.type != products_on:
            return F.linear(x, weight, bias)
        dtype = _product_dtype(x)  # the residual keeps its own: y promotes, as a sum does
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
        if _records(x, weight, bias, residual):
            return _Linear.apply(x, weight, bias, activation, residual, kernels)
        return _forward(kernels, x, weight, bias, activation, residual)[0]

    return run


def _mlp_with_kernels(kernels):
    def run(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
        dtype = _product_dtype(x)
        x, *parameters = (t.to(dtype) for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        if _records(x, *parameters, residual):
            return _Mlp.apply(x, *parameters, activation, residual, kernels)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        h, _ = kernels.linear_fwd(x, fc1_weight, fc1_bias, activation, None, False)
        return _second_layer(h, fc2_weight, fc2_bias, residual, kernels)

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


def _triton_not_worth(x: Tensor, *others) -> str | None:
    """No tensor core multiplies IEEE float32: the product is then most of the time, and the stock one is the best there is."""
    # The public torch.backends.cuda.matmul.allow_tf32 is this, in a form that torch.compile can't trace.
    if _product_dtype(x) == torch.float32 and not torch._C._get_cublas_allow_tf32():
        return "under 'auto' it takes float32 only with torch.backends.cuda.matmul.allow_tf32"
    return None


def _linear_triton_supports(x, weight, bias, activation, residual):
    refused = backends.triton_refuses(x, weight, bias, residual)
    if refused is not None or (activation is None and residual is None):
        return refused
    return refuses_rows("x", x) or refuses_rows("residual", residual) or _refuses_layer(weight, bias)


def _mlp_triton_supports(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    return (
        backends.triton_refuses(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
        or refuses_rows("x", x)
        or refuses_rows("residual", residual)
        or _refuses_layer(fc1_weight, fc1_bias)
        or _refuses_layer(fc2_weight, fc2_bias)
    )


def _refuses_overlap(name: str, tensor: Tensor) -> str | None:
    """cuBLASLt takes no matrix whose rows lie in one another, as those of an expanded one do."""
    rows = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and stride != 1]
    inner = tensor.shape[tensor.stride().index(1)] if 1 in tensor.stride() else 1
    if any(stride < inner for _, stride in rows):
        return f"{name}'s rows must not overlap, got shape {list(tensor.shape)}, strides {tensor.stride()}"
    return None


def _cpp_refuses_product(x, *weights):
    """On a CPU the kernels multiply themselves, in float32 and bfloat16; on a GPU cuBLASLt does."""
    if x.device.type != "cpu":
        refused = [_refuses_overlap(name, t) for name, t in (("x", x), *(("a weight", weight) for weight in weights))]
        return next(filter(None, refused), None)
    dtype = _product_dtype(x)
    if dtype not in extension.DTYPES["cpu"]:
        return f"on a CPU it multiplies in float32 and bfloat16, not in {dtype_name(dtype)}"
    return None


# A tile computes 16 or more of them at once; below that BLAS has better to offer.
_FEWEST_ROWS = 32


def _cpp_not_worth(x: Tensor, *others) -> str | None:
    reason = extension.not_worth(x) or extension.product_not_worth(_product_dtype(x))
    if reason is None and x.numel() < _FEWEST_ROWS * x.shape[-1]:
        return f"under 'auto' it takes at least {_FEWEST_ROWS} rows"
    return reason


def _linear_cpp_supports(x, weight, bias, activation, residual):
    return (
        extension.refuses(x, weight, bias, residual)
        or refuses_rows("x", x)
        or refuses_rows("residual", residual)
        or _refuses_layer(weight, bias)
        or _cpp_refuses_product(x, weight)
    )


def _mlp_cpp_supports(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual):
    return (
        extension.refuses(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual)
        or refuses_rows("x", x)
        or refuses_rows("residual", residual)
        or _refuses_layer(fc1_weight, fc1_bias)
        or _refuses_layer(fc2_weight, fc2_bias)
        or _cpp_refuses_product(x, fc1_weight, fc2_weight)
    )


_linear = Operation(
    "linear",
    {
        "reference": Implementation(linear_reference, backends.anything),
        "torch": Implementation(linear_torch, backends.anything),
        "triton": Implementation(_linear_with_kernels(torch.ops.vit_fast), _linear_triton_supports, _triton_not_worth),
        "cpp": Implementation(
            _linear_with_kernels(torch.ops.vit_fast_cpp, products_on="cpu"), _linear_cpp_supports, _cpp_not_worth
        ),
    },
    order=("triton", "cpp", "torch"),
)

_mlp = Operation(
    "mlp",
    {
        "reference": Implementation(mlp_reference, backends.anything),
        "torch": Implementation(mlp_torch, backends.anything),
        "triton": Implementation(_mlp_with_kernels(torch.ops.vit_fast), _mlp_triton_supports, _triton_not_worth),
        "cpp": Implementation(_mlp_with_kernels(torch.ops.vit_fast_cpp), _mlp_cpp_supports, _cpp_not_worth),
    },
    order=("triton", "cpp", "torch"),
)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {list(ACTIVATIONS)}, got {activation!r}")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    r"""y = act(x Wᵀ + b) + residual.

    :param x: [..., K], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param weight: W, [M, K]; :param bias: b, [M] or None.
    :param activation: None, ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., M], or None.
    :returns: [..., M] in the inputs' dtype; under autocast as ``torch.nn.functional.linear`` gives it.
    :raises ValueError: shapes or devices that do not fit, an unknown activation. TypeError: dtypes that do not fit.
    """
    check_tensors("linear", ("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check_shape("linear", "bias", bias, weight.shape[:1])
    if residual is not None:
        check_shape("linear", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    _check_activation("linear", activation)
    return _linear(x, weight, bias, activation, residual)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str = "gelu",
    residual: Tensor | None = None,
):
    r"""y = act(x W₁ᵀ + b₁) W₂ᵀ + b₂ + residual: ViT's MLP as one differentiable unit.

    One unit rather than two calls of `linear`, so that in the backward pass the derivative of the activation can be applied
    in the epilogue of the product that gives the hidden gradient.

    :param x: [..., D], float32, float16 or bfloat16 (float64 on the stock implementations).
    :param fc1_weight: W₁, [F, D]; :param fc1_bias: b₁, [F].
    :param fc2_weight: W₂, [D', F]; :param fc2_bias: b₂, [D'].
    :param activation: ``"gelu"`` (the exact x·Φ(x)) or ``"gelu_tanh"``.
    :param residual: [..., D'], or None.
    :returns: [..., D'].
    :raises ValueError: shapes or devices that do not fit, an unknown activation. TypeError: dtypes that do not fit.
    """
    check_tensors(
        "mlp",
        ("x", x),
        ("fc1_weight", fc1_weight),
        ("fc1_bias", fc1_bias),
        ("fc2_weight", fc2_weight),
        ("fc2_bias", fc2_bias),
        ("residual", residual),
    )
    check_shape("mlp", "fc1_weight", fc1_weight, (fc1_weight.shape[0], x.shape[-1]))
    check_shape("mlp", "fc1_bias", fc1_bias, fc1_weight.shape[:1])
    check_shape("mlp", "fc2_weight", fc2_weight, (fc2_weight.shape[0], fc1_weight.shape[0]))
    check_shape("mlp", "fc2_bias", fc2_bias, fc2_weight.shape[:1])
    if residual is not None:
        check_shape("mlp", "residual", residual, (*x.shape[:-1], fc2_weight.shape[0]))
    if activation is None:
        raise ValueError("mlp: activation must be 'gelu' or 'gelu_tanh', got None")
    _check_activation("mlp", activation)
    return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, residual)
