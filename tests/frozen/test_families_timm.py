"""timm's models against themselves: every kind of its `VisionTransformer` that is read, and every option that is refused."""

import re

import family_support as support
import pytest
import torch
from torch import nn

timm = support.package("timm")

from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

# timm resizes positions in float32 whatever the model's dtype: that much is lost of float64.
RESIZED = 1e-5
DROPS = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "patch_drop_rate")
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}


def create(name, **options):
    patch = 14 if "14" in name else 8
    size = options.pop("img_size", 3 * patch if "14" in name else (32, 24))
    return support.randomized(timm.create_model(name, **{"img_size": size, "patch_size": patch, **SMALL, **options}))


def native(model):
    return support.images(model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "augreg": ("vit_base_patch16_224.augreg_in21k_ft_in1k", {}),
    "in_chans": ("vit_tiny_patch16_224", {"in_chans": 1}),
    "no_head": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "no_qkv_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no_proj_bias": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "no_pool": ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": ""}),
    "no_pool_fc_norm": ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": "", "fc_norm": True}),
    "no_final_norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "no_positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "token_fc_norm": ("vit_tiny_patch16_224", {"fc_norm": True}),
    "avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avg_no_head": ("vit_tiny_patch16_224", {"global_pool": "avg", "num_classes": 0}),
    "avg_norm_before": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "gap": ("vit_medium_patch16_gap_240", {}),
    "drop_rates": ("vit_tiny_patch16_224", dict.fromkeys(DROPS, 0.3)),
    "miil": ("vit_base_patch16_224_miil", {}),
    "cut_off_edges": ("vit_tiny_patch16_224", {"img_size": (35, 30)}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit_distilled_no_head": ("deit_tiny_distilled_patch16_224", {"num_classes": 0}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2_no_head": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
    "registers_gap": ("vit_medium_patch16_reg4_gap_256", {}),
    "registers_with_positions": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "registers_map": ("vit_so150m_patch16_reg4_map_256", {}),
    "registers_map_prefix": ("vit_base_patch14_reg1_tipsv2", {"num_classes": 0}),
    "clip": ("vit_base_patch32_clip_224", {}),
    "clip_quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "siglip_head": ("vit_so400m_patch14_siglip_384", {}),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", {"num_classes": 0}),
    "tanh_gelu": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "mae": ("vit_base_patch16_224.mae", {"num_classes": 0}),
}


@pytest.mark.parametrize("case", MODELS)
def test_native_size(case):
    name, options = MODELS[case]
    model = create(name, **options)
    x = native(model)
    support.assert_close(support.called(support.described(model), x), support.source(model, x))


RESIZABLE = ("vit", "deit3", "deit_distilled", "dinov2_registers", "registers_gap", "siglip", "no_positions")


@pytest.mark.parametrize("case", RESIZABLE)
def test_dynamic_size(case):
    name, options = MODELS[case]
    model = create(name, dynamic_img_size=True, **options)
    patch = model.patch_embed.patch_size[0]
    description = support.described(model)
    for rows, columns in ((5, 2), (3, 3), (2, 6)):
        x = support.images(3, rows * patch, columns * patch)
        support.assert_close(support.called(description, x), support.source(model, x), RESIZED)


def test_a_fixed_size_is_not_resized_unasked():
    assert not support.described(create("vit_tiny_patch16_224")).architecture.any_size
    assert support.described(create("vit_tiny_patch16_224", dynamic_img_size=True)).architecture.any_size


def test_after_set_input_size_and_reset_classifier():
    model = create("vit_tiny_patch16_224")
    model.set_input_size(img_size=(24, 40))
    model.reset_classifier(5, "avg")
    support.randomized(model, seed=2)
    x = native(model)
    assert x.shape[2:] == (24, 40)
    support.assert_close(support.called(support.described(model), x), support.source(model, x))


def test_a_subclass_that_changes_nothing_is_read():
    class Mine(VisionTransformer):
        def __init__(self, **options):
            super().__init__(**options)

        def extra(self):
            return 1

    model = support.randomized(Mine(img_size=16, patch_size=8, **SMALL))
    x = native(model)
    support.assert_close(support.called(support.described(model), x), support.source(model, x))


def test_masks_are_refused():
    description = support.described(create("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="freeze: attn_mask and is_causal"):
        support.called(description, support.images(3, 32, 24), is_causal=True)


REFUSED = {
    "qk_norm": ({"qk_norm": True}, "qk_norm"),
    "scale_attn_norm": ({"scale_attn_norm": True}, "scale_attn_norm"),
    "scale_mlp_norm": ({"scale_mlp_norm": True}, "scale_mlp_norm"),
    "SwiGLU": ({"mlp_layer": timm.layers.SwiGLU}, "SwiGLU"),
    "SwiGLUPacked": ({"mlp_layer": timm.layers.SwiGLUPacked}, "SwiGLU"),
    "GluMlp": ({"mlp_layer": timm.layers.GluMlp}, "SwiGLU|GluMlp"),
    "silu": ({"act_layer": "silu"}, "activation is torch.nn.modules.activation.SiLU"),
    "relu": ({"act_layer": "relu"}, "activation is .*ReLU"),
    "rms_norm": ({"norm_layer": "rmsnorm"}, "RmsNorm"),
    "post_norm": ({"block_fn": ResPostBlock}, "ResPostBlock"),
    "parallel_scaling": ({"block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
    "parallel_things": ({"block_fn": ParallelThingsBlock}, "ParallelThingsBlock"),
    "differential": ({"attn_layer": "diff"}, "DiffAttention"),
    "dynamic_img_pad": ({"dynamic_img_size": True, "dynamic_img_pad": True}, "dynamic_img_pad"),
    "max": ({"global_pool": "max"}, "global_pool='max'"),
    "avgmax": ({"global_pool": "avgmax"}, "global_pool='avgmax'"),
    "prr": ({"global_pool": "prr"}, "AttentionPoolPrr"),
    "prefix_in_avg": ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
    "head_on_tokens": ({"global_pool": ""}, "head is applied to every token"),
    "patch_norm": ({"embed_norm_layer": "layernorm"}, "patch_embed has a norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case):
    options, message = REFUSED[case]
    model = create("vit_tiny_patch16_224", **options)
    reason = support.refused(model)
    assert re.search(message, reason), reason


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("eva02_tiny_patch14_224", {"depth": 1, "embed_dim": 48, "num_heads": 3}, "rotary positions"),
        ("resnet18", {}, "resnet.ResNet is not supported"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "patch_embed is timm.*HybridEmbed"),
    ],
)
def test_refused_models(name, options, message):
    assert re.search(message, support.refused(timm.create_model(name, **options).eval()))


def test_refused_changes():
    model = create("vit_tiny_patch16_224")
    model.blocks[1].attn.forward = lambda x, **_: x
    assert "forward() of blocks.1.attn was replaced" in support.refused(model)

    class Mine(VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x)

    assert "Mine overrides _pos_embed()" in support.refused(Mine(img_size=16, patch_size=8, **SMALL))

    class Adapted(nn.Linear):
        pass

    model = create("vit_tiny_patch16_224")
    model.blocks[0].attn.qkv = Adapted(48, 144)
    assert "block 0's qkv is" in (reason := support.refused(model)) and "Adapted" in reason

    model = create("vit_tiny_patch16_224")
    model.blocks[1].norm1.eps = 1e-3
    assert "block 1's norms have different eps" in support.refused(model)
    model.blocks[1].norm2.eps = 1e-3
    assert "block 1 differs from block 0: norm_eps" in support.refused(model)

    model = create("vit_tiny_patch16_224")
    model.blocks[1].attn.scale = 1.0
    assert "block 1's attention scales by 1.0" in support.refused(model)

    model = create("vit_tiny_patch16_224")
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, stride=4, dtype=torch.float64)
    assert "neither overlap nor leave gaps" in support.refused(model)
