"""Fast Vision Transformers with the API of jeonsworld/ViT-pytorch."""

__version__ = "0.1.0"
