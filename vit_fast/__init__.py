"""Fast Vision Transformers with the API of jeonsworld/ViT-pytorch.

``from vit_fast import VisionTransformer, CONFIGS`` takes the place of ``from models.modeling import VisionTransformer,
CONFIGS``.
"""

__version__ = "0.1.0"

from vit_fast import backends, ops
from vit_fast.backends import use
from vit_fast.configs import CONFIGS, Config
from vit_fast.frozen import Frozen, freeze
from vit_fast.modeling import (
    MLP,
    Attention,
    Block,
    Embeddings,
    Encoder,
    LayerNorm,
    Mlp,
    Transformer,
    VisionTransformer,
)

__all__ = [
    "CONFIGS",
    "MLP",
    "Attention",
    "Block",
    "Config",
    "Embeddings",
    "Encoder",
    "Frozen",
    "LayerNorm",
    "Mlp",
    "Transformer",
    "VisionTransformer",
    "backends",
    "freeze",
    "ops",
    "use",
]
