"""The operations that do all the work of a Vision Transformer; one file each, read top to bottom."""

from vit_fast.ops.attention import attention
from vit_fast.ops.layer_norm import layer_norm
from vit_fast.ops.linear import linear
from vit_fast.ops.mlp import mlp
from vit_fast.ops.patch_embed import patch_embed

__all__ = ["attention", "layer_norm", "linear", "mlp", "patch_embed"]
