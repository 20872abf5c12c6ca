"""The forward pass of a frozen model: one block loop, over two ways to compute its steps.

`InPlace` runs on the extension's CPU kernels and keeps activations in a few buffers that every block uses again: fresh memory
costs page faults. `Functional` runs on the operations of `vit_fast.ops`, on any device; on a GPU a CUDA graph around it keeps
its memory. Both hold the residual stream h, and take products as `products` prepares them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast.backends import OPERATIONS
from vit_fast.frozen import products
from vit_fast.frozen.description import Outputs
from vit_fast.frozen.fold import Folded
from vit_fast.frozen.positions import RESIZE

_PREPARED = ("qkv", "out", "fc1", "fc2")  # a block's products; the others read a few rows, and stay dense
CACHED_GRIDS = 16  # position tables kept for sizes other than the native one


class _NoBuffers:
    """Every result in memory of its own."""

    def take(self, name: str, *shape: int) -> None:
        return None


class _Buffers:
    """The memory of one forward pass: h, what norms give, and the widest of a block's results."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """The beginning of a buffer as that shape; it grows when it must."""
        size = 1
        for axis in shape:
            size *= axis
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = torch.empty(size, dtype=self.dtype)
        return self.memory[name][:size].view(shape)


class Functional:
    """By the operations of `vit_fast.ops`."""

    unit = 1.0  # of what bytes are divided by, 255, in the folded weight; the operation does the rest

    def __init__(self, engine: Engine):
        self.engine = engine
        self.ones, self.zeros = {}, {}
        # Bytes, divided by 255 by the operation, need no more: the rest is in the weight.
        channels = engine.architecture.channels
        self.mean, self.std = torch.zeros(channels, device=engine.device), torch.ones(channels, device=engine.device)

    @contextlib.contextmanager
    def buffers(self) -> Iterator[_NoBuffers]:
        yield _NoBuffers()

    def keep(self, h: Tensor) -> Tensor:
        """h as a result that stays."""
        return h

    def table(self, positions: Tensor | None, patches: int) -> Tensor:
        """What the operation adds: a row for one prefix token, the last, and the positions; [1, 1 + patches, D]."""
        e = self.engine
        table = torch.zeros((1, 1 + patches, e.architecture.width), device=e.device, dtype=e.dtype)
        if positions is not None:
            table[0, 1:] = positions
        if e.architecture.prefix_tokens:
            table[0, 0] = e.dense["prefix"][-1]
        return table

    def embed(self, images: Tensor, table: Tensor, h: None) -> Tensor:
        a, w = self.engine.architecture, self.engine.dense
        bias = w["patch.bias"] if "patch.bias" in w else self._constant(0, a.width)
        class_token = self._constant(0, a.width).view(1, 1, -1)
        mean, std = (self.mean, self.std) if images.dtype == torch.uint8 else (None, None)
        h = OPERATIONS["patch_embed"](images, w["patch.weight"], bias, class_token, table, mean, std)
        if a.prefix_tokens == 0:
            return h[:, 1:].contiguous()
        return h if a.prefix_tokens == 1 else torch.cat([w["prefix"][:-1].expand(h.shape[0], -1, -1), h], dim=1)

    def _constant(self, value: int, width: int) -> Tensor:
        cache = self.ones if value else self.zeros
        if width not in cache:
            cache[width] = torch.full((width,), float(value), device=self.engine.device, dtype=self.engine.dtype)
        return cache[width]

    def norm(self, x: Tensor, name: str, eps: float, out: Tensor | None = None) -> Tensor:
        w, width = self.engine.dense, x.shape[-1]
        weight = w[name + ".weight"] if name + ".weight" in w else self._constant(1, width)
        bias = w[name + ".bias"] if name + ".bias" in w else self._constant(0, width)
        return OPERATIONS["layer_norm"](x, weight, bias, eps, None)

    def attention(self, qkv: Tensor, kind: str, out: None) -> tuple[Tensor, Tensor | None]:
        return OPERATIONS["attention"](qkv, 0.0, kind)

    def implementations(self) -> dict[str, str]:
        from vit_fast.info import choices

        taken = choices(str(self.engine.device), self.engine.dtype)
        linear = taken["linear"] if self.engine.kind is products.Dense else "oneDNN, packed weights"
        return {op: taken[op] for op in ("patch_embed", "layer_norm", "attention")} | {"linear": linear}


class InPlace:
    """By the extension's CPU kernels, into buffers. Calls at the same time have buffers of their own."""

    unit = 255.0

    def __init__(self, engine: Engine):
        self.engine = engine
        self.idle: list[_Buffers] = []
        self.lock = threading.Lock()
        self.scale = engine.architecture.head_size**-0.5
        w = engine.dense
        self.patch_weight = torch.ops.vit_fast_cpp.linear_pack(w["patch.weight"].flatten(1))

    @contextlib.contextmanager
    def buffers(self) -> Iterator[_Buffers]:
        with self.lock:
            buffers = self.idle.pop() if self.idle else _Buffers(self.engine.dtype)
        try:
            yield buffers
        finally:
            with self.lock:
                self.idle.append(buffers)

    def keep(self, h: Tensor) -> Tensor:
        return h.clone()

    def table(self, positions: Tensor | None, patches: int) -> Tensor | None:
        return positions

    def embed(self, images: Tensor, table: Tensor | None, h: Tensor) -> Tensor:
        a, w = self.engine.architecture, self.engine.dense
        torch.ops.vit_fast_cpp.patch_embed_out(
            images, self.patch_weight, w.get("patch.bias"), table, *a.patch, h[:, a.prefix_tokens :]
        )
        if a.prefix_tokens:
            h[:, : a.prefix_tokens] = w["prefix"]
        return h

    def norm(self, x: Tensor, name: str, eps: float, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        w = self.engine.dense
        torch.ops.vit_fast_cpp.layer_norm_out(x, w.get(name + ".weight"), w.get(name + ".bias"), eps, out)
        return out

    def attention(self, qkv: Tensor, kind: str, out: Tensor) -> tuple[Tensor, Tensor | None]:
        images, tokens, _, heads, _ = qkv.shape
        shapes = {"all": (heads, tokens, tokens), "class_token": (heads, tokens), "head_mean": (tokens, tokens)}
        probabilities = None if kind == "none" else qkv.new_empty((images, *shapes[kind]))
        torch.ops.vit_fast_cpp.attention_out(qkv, self.scale, kind, out, probabilities)
        return out, probabilities

    def implementations(self) -> dict[str, str]:
        return dict.fromkeys(("patch_embed", "layer_norm", "attention"), "cpp") | {"linear": "cpp, packed weights"}


class Engine:
    """Weights as the products want them, and the forward pass.

    :param folded: of `fold.fold`, with `unit` of the computer that `computer_for` names; its weights are taken out of it, so
        that none is held twice.
    """

    def __init__(self, folded: Folded, stem: nn.Module | None, device: torch.device, dtype: torch.dtype):
        self.architecture, self.activation, self.stem = folded.architecture, folded.activation, stem
        self.device, self.dtype = device, dtype
        self.kind = products.best_for(device, dtype)
        weights = folded.weights
        self.products: dict[str, products.Dense] = {}
        self.parts: dict[str, products.Dense | None] = {}  # of the last block's qkv: queries; keys and values
        for i in range(self.architecture.depth):
            for name in (f"blocks.{i}.{part}" for part in _PREPARED):
                self.products[name] = self.kind(weights.pop(name + ".weight"), weights.pop(name + ".bias", None))
        self.dense = weights
        self._split_last()
        self.tables: dict[tuple[int, int], Tensor] = {}
        self.computer = computer_for(device, dtype)(self)

    def _split_last(self) -> None:
        a = self.architecture
        last, width = self.products[f"blocks.{a.depth - 1}.qkv"], a.heads * a.head_size
        parts = last.part(0, width), last.part(width, 3 * width)
        self.parts = dict(zip(("q", "kv"), parts, strict=True)) if None not in parts else {}

    # ---- Weights ----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The folded weights again, dense."""
        found = dict(self.dense)
        for name, product in self.products.items():
            weight, bias = product.dense()
            found[name + ".weight"] = weight
            if bias is not None:
                found[name + ".bias"] = bias
        return found

    @torch.no_grad()
    def update(self, folded: Folded, stem: nn.Module | None) -> None:
        """Other values for all weights, in place: captured graphs go on with them."""
        weights = dict(folded.weights)
        for name, product in self.products.items():
            product.update(weights.pop(name + ".weight"), weights.pop(name + ".bias", None))
        for name, tensor in weights.items():
            self.dense[name].copy_(tensor)
        if isinstance(self.computer, InPlace):
            self.computer.patch_weight.copy_(torch.ops.vit_fast_cpp.linear_pack(self.dense["patch.weight"].flatten(1)))
        for grid, table in self.tables.items():
            if table is not None:
                table.copy_(self._table(grid))
        if stem is not None:
            self.stem.load_state_dict(stem.state_dict())
        self._split_last()

    def memory(self) -> int:
        """Bytes of weights and buffers."""
        tables = [t for t in self.tables.values() if t is not None and t is not self.dense.get("positions")]
        tensors = [*self.dense.values(), *tables]
        tensors += [t for product in self.products.values() for t in product.tensors()]
        if self.stem is not None:
            tensors += [*self.stem.parameters(), *self.stem.buffers()]
        if self.kind is products.OneDnn:
            tensors += [t for part in self.parts.values() for t in part.tensors()]
        if isinstance(self.computer, InPlace):
            tensors += [self.computer.patch_weight, *(t for b in self.computer.idle for t in b.memory.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def table_for(self, grid: tuple[int, int]) -> Tensor | None:
        """What the embedding adds for a grid of patches; kept, a few at a time."""
        if grid not in self.tables:
            if len(self.tables) >= CACHED_GRIDS:
                self.tables.pop(next(iter(self.tables)), None)
            self.tables[grid] = self._table(grid)
        return self.tables[grid]

    def _table(self, grid: tuple[int, int]) -> Tensor | None:
        a, positions = self.architecture, self.dense.get("positions")
        if positions is not None and grid != a.grid:
            positions = RESIZE[a.resize](positions, a.grid, grid)
        return self.computer.table(positions, grid[0] * grid[1])

    # ---- The forward pass -------------------------------------------------------------------------------------------

    def run(self, images: Tensor, outputs: Outputs, class_token_only: bool) -> dict[str, Tensor | list[Tensor]]:
        """The outputs for images [B, C, H, W], floating point in the engine's dtype, or bytes where they were folded for."""
        a, c = self.architecture, self.computer
        if self.stem is not None:
            images = self.stem(images)
        grid = a.grid_for(images.shape[2], images.shape[3])
        images_count, tokens = images.shape[0], a.prefix_tokens + grid[0] * grid[1]
        read = {"class_token": 1, "first_two": 2}.get(a.pool) if class_token_only else None
        if not outputs.kinds <= {"logits", "pooled"}:
            read = None
        found: dict[str, Tensor] = {}
        with c.buffers() as buffers:
            h = c.embed(images, self.table_for(grid), buffers.take("h", images_count, tokens, a.width))
            if a.pre_norm_eps is not None:
                h = c.norm(h, "pre_norm", a.pre_norm_eps, out=buffers.take("h", images_count, tokens, a.width))
            if "embeddings" in outputs.kinds:
                found["embeddings"] = c.keep(h)
            for i in range(a.depth):
                h = self._block(i, h, buffers, outputs, found, read if i == a.depth - 1 else None)
                if outputs.of_layer("layer", i):
                    found[f"layer:{i}"] = c.keep(h)
            self._finish(h, outputs, found)
        return outputs.collect(found)

    def _block(self, i: int, h: Tensor, buffers, outputs: Outputs, found: dict[str, Tensor], read: int | None) -> Tensor:
        """Block i on h; with ``read`` only for so many first tokens, of all of which keys and values are still computed."""
        a, c = self.architecture, self.computer
        block = f"blocks.{i}."
        product = {part: self.products[block + part] for part in _PREPARED}
        images, tokens, width = h.shape
        attended = a.heads * a.head_size
        n = c.norm(h, block + "norm1", a.norm_eps, out=buffers.take("n", images, tokens, width))
        if read is None:
            kind = _kind(i, outputs)
            qkv = product["qkv"](n, out=buffers.take("wide", images, tokens, 3 * attended))
            context, probabilities = c.attention(
                qkv.view(images, tokens, 3, a.heads, a.head_size), kind, buffers.take("n", images, tokens, attended)
            )
            _keep_probabilities(i, kind, probabilities, outputs, found)
        else:
            context = self._few(n, read, product["qkv"], buffers)
            h = h[:, :read].contiguous()
            tokens = read
        into = h if isinstance(c, InPlace) else None
        h = product["out"](context, residual=h, out=into)
        n = c.norm(h, block + "norm2", a.norm_eps, out=buffers.take("n", images, tokens, width))
        hidden = product["fc1"](n, activation=self.activation, out=buffers.take("wide", images, tokens, a.mlp_width))
        return product["fc2"](hidden, residual=h, out=into)

    def _few(self, n: Tensor, read: int, qkv: products.Dense, buffers) -> Tensor:
        """Attention of the first tokens to all."""
        a = self.architecture
        images, tokens, _ = n.shape
        attended = a.heads * a.head_size
        if self.parts:
            q = self.parts["q"](n[:, :read].contiguous())
            kv = self.parts["kv"](n, out=buffers.take("wide", images, tokens, 2 * attended))
        else:
            whole = qkv(n, out=buffers.take("wide", images, tokens, 3 * attended))
            q, kv = whole[:, :read, :attended], whole[:, :, attended:]
        q = q.unflatten(2, (a.heads, a.head_size)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, a.heads, a.head_size)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _finish(self, h: Tensor, outputs: Outputs, found: dict[str, Tensor]) -> None:
        """The last norm, pooling and head, each as far as the outputs need it."""
        a, c = self.architecture, self.computer

        def normed(x: Tensor) -> Tensor:
            return c.keep(x) if a.final_norm_eps is None else c.norm(x.contiguous(), "norm", a.final_norm_eps)

        tokens = None
        if "tokens" in outputs.kinds:
            tokens = found["tokens"] = normed(h)
        if outputs.kinds.isdisjoint({"pooled", "logits"}):
            return
        if a.pool in ("class_token", "first_two"):
            first = 1 if a.pool == "class_token" else 2
            pooled = (normed(h[:, :first]) if tokens is None else tokens[:, :first]).flatten(1)
        else:
            tokens = normed(h) if tokens is None else tokens
            pooled = self._pool(tokens)
        if a.pool_norm_eps is not None:
            pooled = c.norm(pooled.contiguous(), "pool_norm", a.pool_norm_eps)
        if a.pooler:
            pooled = torch.tanh(self._linear(pooled, "pooler"))
        if "pooled" in outputs.kinds:
            found["pooled"] = pooled
        if "logits" in outputs.kinds:
            found["logits"] = self._linear(pooled, "head")

    def _pool(self, tokens: Tensor) -> Tensor:
        a, w = self.architecture, self.dense
        if a.pool == "patch_mean":
            return tokens[:, a.prefix_tokens :].mean(1)
        if a.pool == "class_token_and_patch_mean":
            return torch.cat([tokens[:, 0], tokens[:, a.prefix_tokens :].mean(1)], dim=1)
        tokens = tokens[:, a.extras["pool_from"] :]
        probabilities = torch.softmax(F.linear(tokens, w["pool.scores"]), dim=1)  # [B, N, h]
        context = torch.matmul(probabilities.transpose(1, 2), tokens)  # [B, h, D]
        heads = context.shape[1]
        # One product a head: [h, B, D] by [h, D, d].
        value = torch.matmul(context.transpose(0, 1), w["pool.value.weight"].unflatten(0, (heads, -1)).transpose(1, 2))
        value = value.transpose(0, 1).flatten(1)
        y = self._linear(value if "pool.value.bias" not in w else value + w["pool.value.bias"], "pool.out")
        n = self.computer.norm(y, "pool.norm", a.extras["pool_eps"])
        hidden = self._linear(n, "pool.fc1")
        hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden, approximate=_APPROXIMATE[self.activation])
        return y + self._linear(hidden, "pool.fc2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.dense[name + ".weight"], self.dense.get(name + ".bias"))


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def computer_for(device: torch.device, dtype: torch.dtype) -> type[Functional | InPlace]:
    """Which of the two computes there."""
    return InPlace if products.best_for(device, dtype) is products.Packed else Functional


def _kind(layer: int, outputs: Outputs) -> str:
    """Which probabilities the attention has to give."""
    wanted = [kind for name, kind in _KINDS.items() if outputs.of_layer(name, layer)]
    return "none" if not wanted else wanted[0] if len(wanted) == 1 else "all"


_KINDS = {"attention": "all", "attention_class_token": "class_token", "attention_mean": "head_mean"}


def _keep_probabilities(
    layer: int, kind: str, probabilities: Tensor | None, outputs: Outputs, found: dict[str, Tensor]
) -> None:
    of = {"all": lambda p: p, "class_token": lambda p: p[:, :, 0], "head_mean": lambda p: p.mean(1)}
    for name, wanted in _KINDS.items():
        if outputs.of_layer(name, layer):
            found[f"{name}:{layer}"] = probabilities if kind == wanted else of[wanted](probabilities)
