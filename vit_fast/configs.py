"""The published model sizes, and the configuration type that holds them.

Sources: Dosovitskiy et al. 2021, table 1 (B, L, H) and section 4.1 (the hybrid); Steiner et al., How to train your ViT? (2022),
table 2 (Ti, S, R50 stem); Zhai et al., Scaling Vision Transformers (2022), table 2 (g).
"""

from __future__ import annotations


class Config(dict):
    """A dict whose items are attributes too: ``config.transformer.num_heads``, ``config.patches.get("grid")``, ``del
    config.x``.

    Model classes accept any object with both kinds of access, such as ``ml_collections.ConfigDict``.
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this configuration has no field {name!r} (it has {', '.join(self)})") from None

    def __setattr__(self, name, value):
        self[name] = value

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this configuration has no field {name!r} (it has {', '.join(self)})") from None

    def __reduce__(self):  # copies and pickles as the plain dict it is
        return Config, (dict(self),)

    def __deepcopy__(self, memo):
        import copy

        return Config(copy.deepcopy(dict(self), memo))


def sized(patch: tuple[int, int], hidden_size: int, mlp_dim: int, num_heads: int, num_layers: int) -> Config:
    """The configuration of a plain ViT of these sizes."""
    return Config(
        patches=Config(size=tuple(patch)),
        hidden_size=hidden_size,
        transformer=Config(
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            attention_dropout_rate=0.0,
            dropout_rate=0.1,
        ),
        classifier="token",
        representation_size=None,
    )


def _vit(patch: int, *sizes: int) -> Config:
    return sized((patch, patch), *sizes)


def _r50_b16() -> Config:
    """A ResNet-50 with its fourth stage left out, then ViT-B on its 14×14 grid of features."""
    config = _vit(16, 768, 3072, 12, 12)
    config.patches = Config(grid=(14, 14))
    config.resnet = Config(num_layers=(3, 4, 9), width_factor=1)
    return config


CONFIGS: dict[str, Config] = {
    "ViT-Ti_16": _vit(16, 192, 768, 3, 12),
    "ViT-S_16": _vit(16, 384, 1536, 6, 12),
    "ViT-S_32": _vit(32, 384, 1536, 6, 12),
    "ViT-B_16": _vit(16, 768, 3072, 12, 12),
    "ViT-B_32": _vit(32, 768, 3072, 12, 12),
    "ViT-L_16": _vit(16, 1024, 4096, 16, 24),
    "ViT-L_32": _vit(32, 1024, 4096, 16, 24),
    "ViT-H_14": _vit(14, 1280, 5120, 16, 32),
    "ViT-g_14": _vit(14, 1408, 6144, 16, 40),
    "R50-ViT-B_16": _r50_b16(),
    "testing": _vit(16, 1, 1, 1, 1),
}


def name_of(
    hidden_size: int, mlp_dim: int, num_layers: int, patch: tuple[int, int] | None, num_heads: int | None = None
) -> str | None:
    """The entry of CONFIGS of these sizes, or None.

    No patch means the hybrid. Without a number of heads, which no tensor's shape tells, any will do.
    """
    for name, config in CONFIGS.items():
        t = config.transformer
        sizes = config.hidden_size, t.mlp_dim, t.num_layers, config.patches.get("size")
        if sizes == (hidden_size, mlp_dim, num_layers, patch) and num_heads in (None, t.num_heads):
            return name
    return None
