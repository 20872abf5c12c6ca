r"""What an operation must at least do, and how long that takes at least.

.. math:: t_{floor} = \max\left(\frac{FLOP}{FLOP/s},\ \frac{bytes}{bytes/s}\right)

Counted are the multiply-adds of products (two FLOP each) and every tensor that must cross the memory bus once: inputs read
once, results written once, nothing kept in a cache from one operation to the next. Row statistics (4 or 8 bytes a row) are left
out. An implementation may do more than this; none can do less. The formulas stand in the docstrings here.
"""

from __future__ import annotations

from dataclasses import dataclass

DIRECTIONS = ("forward", "training forward", "backward")  # training: forward that keeps what its backward needs


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of one call."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceiling:
    """How fast a device can go at most; TFLOP/s by the kind of product, TB/s of memory."""

    device: str
    tensor16: float  # bfloat16 and float16 products with float32 sums
    tf32: float
    float32: float  # products without tensor cores
    bandwidth: float
    source: str

    def tflops(self, dtype: str) -> float:
        """The product rate for a dtype named as in the reports: bf16, fp16, tf32, fp32."""
        return {"bf16": self.tensor16, "fp16": self.tensor16, "tf32": self.tf32, "fp32": self.float32}[dtype]

    def floor_us(self, work: Work, dtype: str) -> float:
        """Microseconds below which no implementation can go."""
        return max(work.flops / (self.tflops(dtype) * 1e12), work.bytes / (self.bandwidth * 1e12)) * 1e6


# By architecture: the card that an untuned device of it is taken for (kernels/common.py). Measured ceilings where there are
# any; else a vendor's dense peak, which nothing reaches (about 80 % of the products and 90 % of the memory is usual).
CEILINGS = {
    80: Ceiling("A100 80GB", 312, 156, 19.5, 2.04, "datasheet"),
    86: Ceiling("A40", 149.7, 74.8, 37.4, 0.696, "datasheet"),
    89: Ceiling("RTX 4090", 165.2, 82.6, 82.6, 1.008, "datasheet"),
    # 16-bit products and memory measured on such a card (8192³ product, copy); TF32 is half, float32 the datasheet's.
    90: Ceiling("H100 SXM", 798, 399, 66.9, 3.0, "measured, float32 datasheet"),
    100: Ceiling("B200", 2250, 1125, 75, 8.0, "datasheet"),
    120: Ceiling("RTX 5090", 209.5, 104.8, 104.8, 1.792, "datasheet"),
    "gfx942": Ceiling("MI300X", 1307.4, 653.7, 163.4, 5.3, "datasheet"),
    "gfx950": Ceiling("MI355X", 2516, 157.3, 157.3, 8.0, "datasheet; no TF32 units"),
}


# ---- The operations' work -------------------------------------------------------------------------------------------


def layer_norm(direction: str, rows: int, columns: int, itemsize: int, residual: bool = False) -> Work:
    """Forward reads x (and r) and writes y (and s). Backward reads dy, x (or s, and ds) and writes dx, dγ, dβ."""
    tensors = (4 if residual else 2) if direction != "backward" else (4 if residual else 3)
    return Work(0, itemsize * columns * (tensors * rows + (4 if direction == "backward" else 2)))


def linear(
    direction: str,
    rows: int,
    inputs: int,
    outputs: int,
    itemsize: int,
    residual: bool = False,
    activation: bool = False,
) -> Work:
    """y = act(x Wᵀ + b) + r, and backward dx, dW, db (dr is dy itself).

    With an activation, training writes the pre-activation and its backward reads it.
    """
    product = 2.0 * rows * inputs * outputs
    weights = inputs * outputs + outputs
    if direction == "backward":
        moved = rows * outputs * (2 if activation else 1) + 2 * rows * inputs + 2 * weights
        return Work(2 * product, itemsize * moved)
    moved = rows * inputs + weights + rows * outputs * (1 + residual)
    if direction == "training forward" and activation:
        moved += rows * outputs
    return Work(product, itemsize * moved)


def mlp(direction: str, rows: int, inputs: int, hidden: int, itemsize: int, residual: bool = False) -> Work:
    """Two products with the hidden layer written once and read once.

    Backward: z read, dz = (dy W₂)·act'(z) and act(z) written, and read by the products that need them.
    """
    if direction != "backward":
        first = linear(direction, rows, inputs, hidden, itemsize, activation=True)
        return first + linear(direction, rows, hidden, inputs, itemsize, residual=residual)
    weights = 2 * inputs * hidden + inputs + hidden
    moved = 3 * rows * inputs + 5 * rows * hidden + 2 * weights  # dy, x, dx; z; dz and act(z) twice each
    return Work(8.0 * rows * inputs * hidden, itemsize * moved)


def attention(
    direction: str, batch: int, tokens: int, heads: int, head_size: int, itemsize: int, probabilities: int = 0
) -> Work:
    """Forward: two products; reads q, k, v and writes o. Backward: five products; reads q, k, v, o, do and writes dq, dk, dv.

    ``probabilities``: how many entries of them an image returns, and receives gradients for.
    """
    u = batch * tokens * heads * head_size * itemsize
    product = 2.0 * batch * heads * tokens * tokens * head_size
    extra = batch * probabilities * itemsize
    return Work(5 * product, 8 * u + extra) if direction == "backward" else Work(2 * product, 4 * u + extra)


def patch_embed(
    direction: str,
    batch: int,
    channels: int,
    height: int,
    width: int,
    patch: int,
    columns: int,
    itemsize: int,
    image_itemsize: int,
    image_gradient: bool = False,
) -> Work:
    """Forward reads the images, writes the tokens. Backward reads the images and the tokens' gradient, writes the parameters'
    gradients and, when asked, the images'."""
    patches = (height // patch) * (width // patch)
    inputs = channels * patch * patch
    product = 2.0 * batch * patches * inputs * columns
    images = batch * channels * height * width * image_itemsize
    tokens = batch * (1 + patches) * columns * itemsize
    parameters = (inputs * columns + 2 * columns + (1 + patches) * columns) * itemsize
    if direction != "backward":
        return Work(product, images + tokens + parameters)
    return Work(product * (1 + image_gradient), images * (1 + image_gradient) + tokens + parameters)


# ---- A whole model --------------------------------------------------------------------------------------------------


def model_flops(tokens: int, width: int, layers: int, hidden: int, patch: int, classes: int = 1000, channels: int = 3) -> float:
    """FLOP of one image, forward: products of the patch embedding, the blocks and the head."""
    block = 2.0 * tokens * width * (4 * width + 2 * hidden) + 4.0 * tokens * tokens * width
    return layers * block + 2.0 * (tokens - 1) * channels * patch * patch * width + 2.0 * width * classes
