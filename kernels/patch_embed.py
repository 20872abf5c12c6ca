"""Patch embedding: patch gather, product, bias, class row and position add in one kernel; its weight's gradient gathers again.

Forward: a product of [B·N, K] by [K, D], K = C·P·P', whose left operand is read from the images where it lies. Row b·N is image
b's class row: nothing is gathered for it, and it takes the class token where the others take the product and the bias. So the
output is one dense matrix.
Backward: the weight's gradient, [D, K], sums over all patches. It is cut into shares of the rows, whose partial products are
added up in a fixed order; gathering the patches again moves the images once, where a buffer of patches would be written and
read besides. Sums over the batch and the images' gradient have nothing to gather and are stock PyTorch.

K is ordered so that a patch's neighbours in memory are neighbours in K: (c, y, x), or (y, x, c) for channels_last images.
"""

import torch
import triton
import triton.language as tl

from vit_fast.kernels.common import Target, dot, dot_precision, on_device, target_of, tuned

# ---- Launch choices -------------------------------------------------------------------------------------------------

# (rows, columns, depth of a step, warps, stages), largest first: forward_config takes the first that suits the shape.
# Chosen by compiling for sm_80, sm_90 and sm_100 with Triton 3.6 and 3.9: no spills. sm_90's widest does 85 FLOP a byte from
# the L2; two programs of 128 columns would overlap one's epilogue with the other's products, but do 64, which asks for more
# than the L2 gives. "narrow": where a patch's pixels come in runs of less than 16 bytes (P = 14), addresses take the registers
# of a step of 64; "scattered": in runs of less than 4 bytes, below which no load is asynchronous, the tile's registers too.
_FORWARD = {
    "16-bit, sm_90": ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4)),
    "16-bit, sm_90, narrow": ((128, 256, 32, 8, 4), (128, 128, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 32, 4, 4)),
    "16-bit, sm_90, scattered": ((128, 128, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 32, 4, 4)),
    "16-bit": ((128, 128, 32, 8, 4), (64, 64, 32, 4, 4), (32, 32, 64, 4, 3)),
    "16-bit, hip": ((128, 128, 32, 4, 2), (64, 64, 32, 4, 2), (32, 32, 64, 4, 2)),
    "tf32": ((128, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
    "ieee": ((64, 64, 16, 4, 2), (32, 32, 16, 4, 2)),
}
_BACKWARD = {
    "16-bit, sm_90": (128, 128, 64, 8, 3),
    "16-bit": (128, 128, 32, 8, 3),
    "16-bit, hip": (128, 128, 32, 8, 2),
    "tf32": (128, 64, 32, 4, 3),
    "ieee": (64, 64, 16, 4, 2),
}
_LEAST_STEPS = 8  # of a share of the weight's gradient: below that its partial sums cost more than its products


def _precision(dtype: torch.dtype, target: Target) -> str:
    """`dot_precision`, where the target has it: not every AMD one knows TF32, and Triton refuses to compile for those."""
    return "ieee" if target.backend == "hip" else dot_precision(dtype)


def _class(dtype: torch.dtype, target: Target) -> str:
    if dtype.itemsize != 2:
        return _precision(dtype, target)
    if target.backend == "hip":
        return "16-bit, hip"
    return "16-bit, sm_90" if target.arch in (90, 100) else "16-bit"


@tuned
def forward_config(rows: int, width: int, run: int, dtype: torch.dtype, target: Target) -> tuple[int, ...]:
    """(rows, columns, depth of a step, warps, stages) of a program, for [rows, K] by [K, width]; run: bytes, see `_run`.

    The first whose columns exceed the width by less than an eighth and which gives every multiprocessor a program.
    """
    name = _class(dtype, target)
    suffix = "" if run >= 16 else ", narrow" if run >= 4 else ", scattered"
    tiles = _FORWARD.get(name + suffix, _FORWARD[name])
    for block_m, block_n, *rest in tiles:
        padded = triton.cdiv(width, block_n) * block_n
        if 8 * padded <= 9 * width and triton.cdiv(rows, block_m) * padded // block_n >= target.multiprocessors:
            return block_m, block_n, *rest
    return tiles[-1]


@tuned
def backward_config(rows: int, width: int, depth: int, dtype: torch.dtype, target: Target) -> tuple[int, ...]:
    """(rows, columns, patches of a step, warps, stages, shares) for the weight's gradient [width, depth] over all patches."""
    block_m, block_n, block_r, warps, stages = _BACKWARD[_class(dtype, target)]
    tiles = triton.cdiv(width, block_m) * triton.cdiv(depth, block_n)
    shares = min(2 * target.multiprocessors // tiles, rows // (_LEAST_STEPS * block_r))
    return block_m, block_n, block_r, warps, stages, max(shares, 1)


# ---- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _in_patch(k, c_stride, h_stride, w_stride, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PIXELS: tl.constexpr):
    """Of elements k of a patch: their offsets from its first one, int64, and their channels."""
    if PIXELS:  # whole pixels lie side by side: k = (y, x, c)
        y, xc = k // (PW * C), k % (PW * C)
        return y.to(tl.int64) * h_stride + xc, xc % C
    c, y, x = k // (PH * PW), k // PW % PH, k % PW
    return c.to(tl.int64) * c_stride + y.to(tl.int64) * h_stride + x.to(tl.int64) * w_stride, c


@triton.jit
def _gather(
    images_ptr,
    origin,  # [M], where the patches begin
    in_m,
    offset,  # [K], from there
    in_k,
    scale,  # [K], or None: images as they are
    shift,
    dtype: tl.constexpr,
    K_FIRST: tl.constexpr,
):
    """A tile [M, K] of patches. What is masked may be anything finite: each product with it is by zero, or is left out."""
    if K_FIRST:
        # 1×1 patches of planes: neighbours in memory are neighbouring patches, so the threads of a warp walk along those.
        x = tl.load(images_ptr + offset[:, None] + origin[None, :], mask=in_k[:, None] & in_m[None, :], other=0)
        x = tl.trans(x)
    else:
        x = tl.load(images_ptr + origin[:, None] + offset[None, :], mask=in_m[:, None] & in_k[None, :], other=0)
    if scale is not None:
        if images_ptr.dtype.element_ty == tl.uint8:
            # The float 2**23 + x has the byte x in its last bits: one subtraction instead of a conversion, which is slow.
            x = (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        x = x.to(scale.dtype) * scale[None, :] + shift[None, :]
    return x.to(dtype)


@triton.jit
def _normalisation(images_ptr, mean_ptr, std_ptr, channel, C: tl.constexpr, dtype: tl.constexpr):
    """(x - mean) / std, bytes divided by 255 before, as x · scale + shift: a rounding step or two of float32 from it.

    By selection among the channels' scalars, which stay in registers, not by a load for each element of K.
    """
    unit = 255.0 if images_ptr.dtype.element_ty == tl.uint8 else 1.0
    scale = tl.zeros(channel.shape, dtype)
    shift = tl.zeros(channel.shape, dtype)
    for c in tl.static_range(C):
        mean, std = tl.load(mean_ptr + c).to(dtype), tl.load(std_ptr + c).to(dtype)
        scale = tl.where(channel == c, 1.0 / (std * unit), scale)
        shift = tl.where(channel == c, -mean / std, shift)
    return scale, shift


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _finish(acc, bias_ptr, cls_token_ptr, position_ptr, out_ptr, token, n, rows, position_stride, D: tl.constexpr):
    """Add bias and position, put in class rows, store. out_ptr is the tile's first row; so many rows are left from there."""
    in_n = n < D
    row = tl.arange(0, acc.shape[0])
    mask = (row < rows)[:, None] & in_n[None, :]
    bias = tl.load(bias_ptr + n, mask=in_n, other=0.0).to(acc.dtype)
    cls_token = tl.load(cls_token_ptr + n, mask=in_n, other=0.0).to(acc.dtype)
    position = tl.load(position_ptr + token[:, None].to(tl.int64) * position_stride + n[None, :], mask=mask, other=0.0)
    out = tl.where((token > 0)[:, None], acc + bias[None, :], cls_token[None, :]) + position.to(acc.dtype)
    tl.store(out_ptr + row[:, None] * D + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "grid_w", "depth"])
def _patch_embed_fwd_kernel(
    images_ptr,  # [B, C, H, W]
    weight_ptr,  # [D, K], contiguous
    bias_ptr,
    cls_token_ptr,
    position_ptr,  # [tokens, D]
    mean_ptr,  # or None
    std_ptr,
    out_ptr,  # [rows, D], contiguous
    rows,  # B · tokens
    tokens,
    grid_w,
    depth,  # K again: a loop of known length would be unrolled whole, which takes registers that there are not
    image_stride,
    c_stride,
    h_stride,
    w_stride,
    position_stride,
    D: tl.constexpr,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PIXELS: tl.constexpr,
    K_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    acc_type: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    # Neighbouring programs share their patches: they come from the L2 for all but the first.
    first_row = (tl.program_id(0) // tl.cdiv(D, BLOCK_N)).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(0) % tl.cdiv(D, BLOCK_N) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    in_n = n < D

    # One wide division for the tile, narrow ones for its rows.
    first_image = first_row // tokens
    run = (first_row - first_image * tokens).to(tl.int32) + tl.arange(0, BLOCK_M)
    left_rows = tl.minimum(rows - first_row, BLOCK_M).to(tl.int32)
    token = run % tokens
    patch = token - 1
    origin = (first_image + run // tokens) * image_stride
    origin += (patch // grid_w).to(tl.int64) * PH * h_stride + (patch % grid_w).to(tl.int64) * PW * w_stride
    in_m = (tl.arange(0, BLOCK_M) < left_rows) & (token > 0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], acc_type)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < K
        offset, channel = _in_patch(k, c_stride, h_stride, w_stride, C, PH, PW, PIXELS)
        scale, shift = None, None
        if mean_ptr is not None:
            if not PIXELS and PH * PW % BLOCK_K == 0:  # one channel a step
                channel = tl.full([BLOCK_K], start // (PH * PW), tl.int32)
            scale, shift = _normalisation(images_ptr, mean_ptr, std_ptr, channel, C, acc_type)
        x = _gather(images_ptr, origin, in_m, offset, in_k, scale, shift, dtype, K_FIRST)
        w = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    # By quarters: all at once, position, sum and addresses take more registers than there are beside the accumulator.
    out_ptr += first_row * D
    left, right = _halves(acc)
    for i in tl.static_range(2):
        first, second = _halves(left if i == 0 else right)
        quarter = first_n + i * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 4)
        _finish(first, bias_ptr, cls_token_ptr, position_ptr, out_ptr, token, quarter, left_rows, position_stride, D)
        quarter += BLOCK_N // 4
        _finish(second, bias_ptr, cls_token_ptr, position_ptr, out_ptr, token, quarter, left_rows, position_stride, D)


@triton.jit(do_not_specialize=["rows", "patches", "grid_w", "share"])
def _patch_embed_bwd_kernel(
    dout_ptr,  # [B, 1 + patches, D], contiguous
    images_ptr,  # [B, C, H, W]
    mean_ptr,  # or None
    std_ptr,
    partials_ptr,  # [shares, D, K]
    rows,  # B · patches
    patches,
    grid_w,
    share,  # rows of one, a multiple of BLOCK_R
    image_stride,
    c_stride,
    h_stride,
    w_stride,
    dtype: tl.constexpr,  # of the product's operands
    D: tl.constexpr,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PIXELS: tl.constexpr,
    K_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    acc_type: tl.constexpr = partials_ptr.dtype.element_ty
    m = tl.program_id(0) // tl.cdiv(K, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_k = m < D, k < K
    offset, channel = _in_patch(k, c_stride, h_stride, w_stride, C, PH, PW, PIXELS)
    scale, shift = None, None
    if mean_ptr is not None:
        scale, shift = _normalisation(images_ptr, mean_ptr, std_ptr, channel, C, acc_type)

    part = tl.program_id(1).to(tl.int64)
    first_row = part * share
    first_image = first_row // patches
    first_patch = (first_row - first_image * patches).to(tl.int32)
    here = tl.minimum(rows - first_row, share).to(tl.int32)

    acc = tl.zeros([BLOCK_M, BLOCK_N], acc_type)
    for start in range(0, here, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        in_r = r < here
        image, patch = first_image + (first_patch + r) // patches, (first_patch + r) % patches
        origin = image * image_stride
        origin += (patch // grid_w).to(tl.int64) * PH * h_stride + (patch % grid_w).to(tl.int64) * PW * w_stride
        x = _gather(images_ptr, origin, in_r, offset, in_k, scale, shift, dtype, K_FIRST)
        dout_row = image * (patches + 1) + 1 + patch
        dout = tl.load(dout_ptr + dout_row[None, :] * D + m[:, None], mask=in_m[:, None] & in_r[None, :], other=0.0)
        acc = dot(dout.to(dtype), x, acc, PRECISION)

    out = partials_ptr + (part * D + m[:, None]) * K + k[None, :]
    tl.store(out, acc, mask=in_m[:, None] & in_k[None, :])


# ---- Launchers ------------------------------------------------------------------------------------------------------


_TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def _layout(images: torch.Tensor, weight: torch.Tensor) -> dict:
    """How a kernel walks over a patch."""
    _, c, ph, pw = weight.shape
    pixels = images.stride(1) == 1 and images.stride(3) == c
    return dict(C=c, PH=ph, PW=pw, PIXELS=pixels, K_FIRST=ph == pw == 1 and not pixels)


def _run(images: torch.Tensor, layout: dict) -> int:
    """Bytes of a patch that lie side by side, as far as one load may take them: the largest power of two in a row's."""
    elements = layout["PW"] * layout["C"] if layout["PIXELS"] else layout["PW"] if images.stride(3) == 1 else 1
    return (elements & -elements) * images.element_size()


def patch_embed_fwd(images, weight, bias, cls_token, position_embeddings, mean, std):
    """The embedding [B, N, D] of images [B, C, H, W], uint8 or floating point, by a weight [D, C, P, P'].

    The product's operands have the weight's dtype; the result that of weight + cls_token + position_embeddings.
    """
    width, _, ph, pw = weight.shape
    batch, tokens, grid_w = images.shape[0], position_embeddings.shape[1], images.shape[3] // pw
    dtype = torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), position_embeddings.dtype)
    out = torch.empty(batch, tokens, width, dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    layout = _layout(images, weight)
    # The weight in the order of the patch: as it lies in memory, or a copy of it where it lies otherwise (1.2 MB for ViT-B/16).
    matrix = (weight.permute(0, 2, 3, 1) if layout["PIXELS"] else weight).contiguous()
    target, run = target_of(images.device), _run(images, layout)
    block_m, block_n, block_k, warps, stages = forward_config(batch * tokens, width, run, weight.dtype, target)
    with on_device(images):
        _patch_embed_fwd_kernel[(triton.cdiv(batch * tokens, block_m) * triton.cdiv(width, block_n),)](
            images, matrix, bias, cls_token, position_embeddings, mean, std, out,
            batch * tokens, tokens, grid_w, weight[0].numel(),
            *images.stride(), position_embeddings.stride(1),
            D=width, **layout, PRECISION=_precision(weight.dtype, target), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def patch_embed_bwd(dout, images, weight, mean, std, images_wanted):
    """(dimages or empty(0), dweight, dbias, dcls_token, dposition_embeddings) for dout [B, N, D].

    dimages and dweight have the dtypes of images and weight, the others that of dout. All are contiguous.
    """
    batch, tokens, width = dout.shape
    sums = torch.sum(dout, 0, dtype=torch.promote_types(dout.dtype, torch.float32))  # one pass over dout; [N, D]
    dbias = sums[1:].sum(0).to(dout.dtype)
    dposition = torch.empty(1, tokens, width, dtype=dout.dtype, device=dout.device)
    dposition[0] = sums
    dcls_token = dposition[:, :1].clone()
    dweight = _weight_gradient(dout.contiguous(), images, weight, mean, std)  # expanded and transposed gradients are rare
    dimages = torch.empty(0, dtype=images.dtype, device=images.device)
    if images_wanted:
        dimages = _images_gradient(dout, images, weight, std)
    return dimages, dweight, dbias, dcls_token, dposition


def _weight_gradient(dout, images, weight, mean, std):
    width, c, ph, pw = weight.shape
    batch, patches, grid_w = images.shape[0], dout.shape[1] - 1, images.shape[3] // pw
    rows, depth = batch * patches, c * ph * pw
    if rows == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    layout = _layout(images, weight)
    target = target_of(images.device)
    block_m, block_n, block_r, warps, stages, shares = backward_config(rows, width, depth, weight.dtype, target)
    share = block_r * triton.cdiv(rows, shares * block_r)
    shares = triton.cdiv(rows, share)
    acc_type = torch.promote_types(weight.dtype, torch.float32)
    partials = torch.empty(shares, width, depth, dtype=acc_type, device=weight.device)
    with on_device(images):
        _patch_embed_bwd_kernel[(triton.cdiv(width, block_m) * triton.cdiv(depth, block_n), shares)](
            dout, images, mean, std, partials,
            rows, patches, grid_w, share, *images.stride(),
            dtype=_TRITON[weight.dtype], D=width, **layout, PRECISION=_precision(weight.dtype, target),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    total = partials.sum(0)
    total = total.view(width, ph, pw, c).permute(0, 3, 1, 2) if layout["PIXELS"] else total.view(weight.shape)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return dweight.copy_(total)


def _images_gradient(dout, images, weight, std):
    """The product Eᵀ · doutᵀ, [B, K, patches], moved to where the patches came from.

    Stock PyTorch: in training only a convolutional stem asks for it, and its 1×1 patches make the product the result itself.
    """
    batch, c, height, width = images.shape
    ph, pw = weight.shape[2:]
    grid_h, grid_w = height // ph, width // pw
    matrix = weight.flatten(1).t().expand(batch, -1, -1)
    product = torch.bmm(matrix, dout[:, 1:].to(weight.dtype).transpose(1, 2))
    if std is not None:
        product = product / std.repeat_interleave(ph * pw).view(-1, 1)
    product = product.view(batch, c, ph, pw, grid_h, grid_w).permute(0, 1, 4, 2, 5, 3)
    covered = product.reshape(batch, c, grid_h * ph, grid_w * pw).to(images.dtype)
    if covered.shape == images.shape:
        return covered
    dimages = torch.zeros(images.shape, dtype=images.dtype, device=images.device)
    dimages[:, :, : grid_h * ph, : grid_w * pw] = covered
    return dimages
