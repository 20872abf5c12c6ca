"""What a call through a public operation costs before anything is computed, in eager mode.

Each operation on one small image (32 pixels, five tokens of 64 channels), where hardly anything is computed, against the stock
PyTorch calls that a model would make in its place. On a GPU it is the host's time: launches are queued, not waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from vit_fast import backends, ops
from vit_fast.benchmarks import timing
from vit_fast.benchmarks.cases import DTYPES, Maker, Shape
from vit_fast.benchmarks.record import Record

SHAPE = Shape(model="tiny", image=32, batch=1, patch=16, width=64, hidden=256, heads=2, layers=1)
STOCK = "stock"
_AT_ONCE = 100  # calls between two looks at the clock


def calls_of(make: Maker) -> dict[str, tuple[Callable, Callable]]:
    """For each operation: the stock composition, and the public function; both without arguments."""
    s = SHAPE
    x, r = make(1, s.tokens, s.width), make(1, s.tokens, s.width)
    norm = make(s.width), make(s.width)
    qkv = make(1, s.tokens, 3 * s.width)
    layer = make(s.width, s.width), make(s.width)
    fc1, fc2 = (make(s.hidden, s.width), make(s.hidden)), (make(s.width, s.hidden), make(s.width))
    images = make(1, 3, s.image, s.image, grad=False)
    embedding = make(s.width, 3, s.patch, s.patch), make(s.width), make(1, 1, s.width), make(1, s.tokens, s.width)

    def stock_attention():
        q, k, v = qkv.view(1, s.tokens, 3, s.heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, s.tokens, s.width)

    def stock_patch_embed():
        weight, bias, cls_token, positions = embedding
        patches = F.conv2d(images, weight, bias, stride=s.patch).flatten(2).transpose(1, 2)
        return torch.cat((cls_token, patches), 1) + positions

    return {
        "layer_norm": (lambda: F.layer_norm(x, (s.width,), *norm, 1e-6), lambda: ops.layer_norm(x, *norm, 1e-6)),
        "linear": (lambda: F.linear(x, *layer) + r, lambda: ops.linear(x, *layer, residual=r)),
        "mlp": (
            lambda: F.linear(F.gelu(F.linear(x, *fc1)), *fc2) + r,
            lambda: ops.mlp(x, *fc1, *fc2, residual=r),
        ),
        "attention": (stock_attention, lambda: ops.attention(qkv, s.heads)),
        "patch_embed": (stock_patch_embed, lambda: ops.patch_embed(images, *embedding)),
    }


def measure(record: Record, op: str, dtype: str, device: torch.device, seconds: float = 0.5) -> None:
    """Rows of one operation: in inference, and forward with gradients recorded."""
    for direction, grad in (("inference", False), ("recording", True)):
        stock, public = calls_of(Maker(device, DTYPES[dtype]))[op]
        calls = {STOCK: _often(stock, grad, None, device.type == "cuda")}
        for name in ("auto", *backends.OPERATIONS[op].implementations):
            if name == "triton" and backends.interpreting():  # hundreds of times slower than anything else
                continue
            try:
                with torch.set_grad_enabled(grad), backends.use(name):
                    public()
            except RuntimeError as refused:
                if "cannot run: " not in str(refused):
                    raise
                record.skip(f"overhead {op} {name}: {str(refused).partition('cannot run: ')[2]}")
                continue
            calls[name] = _often(public, grad, name, device.type == "cuda")
        taken = timing.by_turns(calls, seconds, least=5)
        for name in calls:
            each = [ms / _AT_ONCE for ms in taken[name]]
            timed = timing.summary(each, "turns" if device.type == "cpu" else "host")
            ratio = timing.speed_up(taken[STOCK], taken[name]) | {"against": STOCK} if name != STOCK else {}
            more = {} if name == STOCK else {"extra_us": 1e3 * (timed.ms - timing.summary(taken[STOCK], "").ms / _AT_ONCE)}
            record.row(
                timed, group="overhead", op=op, direction=direction, shape="tiny", dtype=dtype, contender=name, **more, **ratio
            )


def _often(call: Callable, grad: bool, implementation: str | None, on_gpu: bool) -> Callable:
    def run():
        with torch.set_grad_enabled(grad), backends.use(implementation or backends.selected()):
            for _ in range(_AT_ONCE):
                call()
        if on_gpu:  # the GPU keeps up with calls as small as these: waiting for it adds its last one
            torch.cuda.synchronize()

    return run
