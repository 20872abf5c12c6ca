"""transformers' models against themselves, in the installed version (4 or 5): outputs, hidden states and attentions."""

import json
import re

import family_support as support
import pytest
import torch
from torch import nn

transformers = support.package("transformers")

# Two families resize positions in float32 whatever the model's dtype, and "eager" attention takes its softmax in float32: that
# much is lost of float64.
SINGLE = 1e-5
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TOWER = SIZES | {"projection_dim": 20}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
CONFIGS = {
    "ViT": (transformers.ViTConfig, SIZES),
    "DeiT": (transformers.DeiTConfig, SIZES),
    "Dinov2": (transformers.Dinov2Config, DINO),
    "Dinov2WithRegisters": (transformers.Dinov2WithRegistersConfig, DINO | {"num_register_tokens": 3}),
    "CLIPVision": (transformers.CLIPVisionConfig, TOWER),
    "SiglipVision": (transformers.SiglipVisionConfig, TOWER),
}


def create(name, attention="sdpa", arguments=(), **options):
    """A model by the name of its class, with options of its configuration."""
    if name in ("CLIPForImageClassification", "SiglipForImageClassification"):
        tower = name.partition("For")[0]
        make, labels = getattr(transformers, f"{tower}Config"), options.pop("num_labels", 5)
        config = make(vision_config=TOWER | options, text_config=TEXT, num_labels=labels)
    else:
        make, sizes = CONFIGS[max((family for family in CONFIGS if name.startswith(family)), key=len)]
        config = make(**(sizes | options))
    config._attn_implementation = attention
    for part in ("vision_config", "text_config"):
        if hasattr(config, part):
            getattr(config, part)._attn_implementation = attention
    return support.randomized(getattr(transformers, name)(config, *arguments))


def assert_same_output(got, expected, tolerance=1e-10):
    """The same class with the same fields, in the same order."""
    assert type(got) is type(expected) and list(got) == list(expected)
    for key in expected:
        support.assert_close(got[key], expected[key], tolerance)


NAMES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPForImageClassification",
    "SiglipVisionModel",
    "SiglipForImageClassification",
)
VARIANTS = {
    "ViTModel-no_pooler": ("ViTModel", {"arguments": (False,)}),
    "ViTModel-pooler_size": ("ViTModel", {"pooler_output_size": 20}),
    "ViTModel-no_qkv_bias": ("ViTModel", {"qkv_bias": False}),
    "ViTModel-rectangle": ("ViTModel", {"image_size": (24, 40), "patch_size": (8, 4)}),
    "ViTModel-cut_off_edges": ("ViTModel", {"image_size": 37}),
    "ViTModel-tanh_gelu": ("ViTModel", {"hidden_act": "gelu_pytorch_tanh"}),
    "ViTModel-new_gelu": ("ViTModel", {"hidden_act": "gelu_new"}),
    "ViTModel-mask_token": ("ViTModel", {"arguments": (True, True)}),
    "ViTModel-dropout": ("ViTModel", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}),
    "ViTModel-channels": ("ViTModel", {"num_channels": 4}),
    "ViT-no_head": ("ViTForImageClassification", {"num_labels": 0}),
    "Teacher-no_head": ("DeiTForImageClassificationWithTeacher", {"num_labels": 0}),
    "Dinov2-no_head": ("Dinov2ForImageClassification", {"num_labels": 0}),
    "Dinov2-drop_path": ("Dinov2Model", {"drop_path_rate": 0.5}),
    "CLIP-gelu": ("CLIPVisionModel", {"hidden_act": "gelu"}),
    "Siglip-no_head": ("SiglipVisionModel", {"vision_use_head": False}),
    "Siglip-cut_off_edges": ("SiglipVisionModel", {"image_size": 37}),
}


def native(description):
    a = description.architecture
    return support.images(a.channels, *a.image_size)


@pytest.mark.parametrize("case", [*NAMES, *VARIANTS])
def test_native_size(case):
    name, options = VARIANTS.get(case, (case, {}))
    model = create(name, **options)
    description = support.described(model)
    x = native(description)
    assert_same_output(support.called(description, x), support.source(model, x))
    assert_same_output(
        support.called(description, pixel_values=x, output_hidden_states=True),
        support.source(model, pixel_values=x, output_hidden_states=True),
    )


@pytest.mark.parametrize("name", NAMES)
def test_attentions(name):
    model = create(name, "eager")
    description = support.described(model)
    x = native(description)
    asked = {"output_attentions": True, "output_hidden_states": True}
    expected = support.source(model, x, **asked)
    assert len(expected.attentions) == 2 and len(expected.hidden_states) == 3
    got = support.called(description, x, **asked)
    assert_same_output(got, expected, SINGLE)
    # Without asking for them, and as the source's own tuple.
    model.config.output_attentions = True
    for part in ("vision_config", "vision_model"):
        if hasattr(model, part) and hasattr(getattr(model, part), "config"):
            getattr(model, part).config.output_attentions = True
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.output_attentions = True
    assert_same_output(support.called(support.described(model), x), support.source(model, x), SINGLE)
    model.config.output_attentions = False
    support.assert_close(
        support.called(description, x, return_dict=False, output_attentions=True),
        support.source(model, x, return_dict=False, output_attentions=True),
        SINGLE,
    )


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "SiglipVisionModel"])
def test_attentions_where_the_source_has_none(name):
    """Its sdpa gives no probabilities: they are the same as eager's."""
    eager, fused = create(name, "eager"), create(name)
    x = native(description := support.described(fused))
    got = support.called(description, x, output_attentions=True)
    support.assert_close(got.attentions, support.source(eager, x, output_attentions=True).attentions, SINGLE)
    support.assert_close(got.last_hidden_state, support.source(fused, x).last_hidden_state)


SHAPES = ((40, 16), (32, 32), (16, 48), (33, 38))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CLIPForImageClassification" and "Dino" not in name])
def test_interpolated_positions(name):
    model = create(name)
    description = support.described(model)
    for shape in SHAPES:
        x = support.images(3, *shape)
        # Here the source interpolates in the dtype of its table.
        assert_same_output(
            support.called(description, x, interpolate_pos_encoding=True),
            support.source(model, x, interpolate_pos_encoding=True),
        )


@pytest.mark.parametrize("name", [name for name in NAMES if "Dino" in name])
def test_any_size(name):
    model = create(name)
    description = support.described(model)
    assert description.architecture.any_size
    for shape in SHAPES:
        x = support.images(3, *shape)
        assert_same_output(support.called(description, x), support.source(model, x), SINGLE)


def test_arguments_by_position():
    model = create("ViTModel")
    description = support.described(model)
    names = description.architecture.extras["parameters"]
    assert names[:2] == ["pixel_values", "bool_masked_pos"] and "interpolate_pos_encoding" in names
    x = support.images(3, 16, 24)
    before = [None] * (names.index("interpolate_pos_encoding") - 1)
    assert_same_output(support.called(description, x, *before, True), support.source(model, x, *before, True))
    with pytest.raises(ValueError, match="frozen without bool_masked_pos"):
        support.called(description, x, torch.ones(2, 6, dtype=torch.bool))


def test_refused_arguments():
    description = support.described(create("ViTForImageClassification"))
    x = native(description)
    with pytest.raises(ValueError, match="frozen without labels"):
        support.called(description, x, labels=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="takes no pixels"):
        support.called(description, pixels=x)
    with pytest.raises(TypeError, match="got pixel_values twice"):
        support.called(description, x, pixel_values=x)
    with pytest.raises(ValueError, match="needs pixel_values"):
        support.called(description)
    with pytest.raises(ValueError, match="output_hidden_states must be True or False"):
        support.called(description, x, output_hidden_states=[1])
    description = support.described(create("ViTModel", image_size=(24, 40)))
    with pytest.raises(ValueError, match="grid that isn't square"):
        support.called(description, native(description), interpolate_pos_encoding=True)


def test_extras_are_json():
    extras = support.described(create("CLIPVisionModelWithProjection")).architecture.extras
    assert json.loads(json.dumps(extras)) == extras


def test_a_model_that_has_recorded_outputs_is_still_read():
    """Version 4 leaves a bound forward() on the layers it recorded, and version 5 a hook: neither is a change."""
    model = create("ViTModel", "eager")
    x = native(support.described(model))
    expected = support.source(model, x, output_hidden_states=True, output_attentions=True)
    is_own_hook = support.families.by_name("transformers").is_own_hook
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(is_own_hook(hook) for hook in hooks) and not is_own_hook(lambda module, args, output: None)
    got = support.called(support.described(model), x, output_hidden_states=True, output_attentions=True)
    assert_same_output(got, expected, SINGLE)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="heads can be pruned in transformers 4 alone")
def test_pruned_heads():
    model = create("ViTModel")
    model.prune_heads({0: [1], 1: [0]})
    model.double()
    description = support.described(model)
    assert description.architecture.heads == 2
    x = native(description)
    assert_same_output(support.called(description, x), support.source(model, x))


REFUSED = {
    "swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}, "SwiGLU"),
    "swiglu_registers": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}, "SwiGLU"),
    "relu": ("ViTModel", {"hidden_act": "relu"}, "block 0's activation is .*ReLU"),
    "silu": ("CLIPVisionModel", {"hidden_act": "silu"}, "block 0's activation is .*SiLU"),
    "pooler_act": ("ViTModel", {"pooler_act": "relu"}, "the pooler's activation is .*ReLU"),
    "rectangle": ("Dinov2Model", {"image_size": (24, 40)}, "3×5 grid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case):
    name, options, message = REFUSED[case]
    reason = support.refused(create(name, **options))
    assert re.search(message, reason), reason


def test_refused_models():
    config = transformers.ViTConfig(**SIZES, encoder_stride=8)
    assert "ViTForMaskedImageModeling is not supported" in support.refused(transformers.ViTForMaskedImageModeling(config))
    if not hasattr(transformers, "DINOv3ViTConfig"):
        return
    config = transformers.DINOv3ViTConfig(**SIZES)
    reason = support.refused(transformers.DINOv3ViTModel(config))
    assert "DINOv3ViTModel is not supported (it has rotary positions)" in reason and "Dinov2Model" in reason


def test_refused_changes():
    class Mine(transformers.ViTModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "Mine overrides forward() of ViTModel" in support.refused(Mine(transformers.ViTConfig(**SIZES)))

    class Adapted(nn.Linear):
        pass

    model = create("CLIPVisionModel")
    layer = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("layers.1.self_attn")))
    layer.q_proj = Adapted(48, 48)
    reason = support.refused(model)
    assert "block 1's q, k and v is" in reason and "Adapted" in reason

    model = create("ViTModel")
    model.layernorm = nn.BatchNorm1d(48)
    assert "layernorm is torch.nn.modules.batchnorm.BatchNorm1d" in support.refused(model)
