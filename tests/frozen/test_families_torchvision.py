"""torchvision's models against themselves."""

import re

import family_support as support
import pytest
import torch
from torch import nn

torchvision = support.package("torchvision")

from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer  # noqa: E402

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 80,
    "num_classes": 7,
}


def create(**options):
    return support.randomized(VisionTransformer(**(SIZES | options)))


def with_heads(*heads):
    model = create()
    model.heads = heads[0] if len(heads) == 1 else nn.Sequential(*heads)
    return support.randomized(model)


MODELS = {
    "vit": create,
    "representation": lambda: create(representation_size=20),
    "dropout": lambda: create(dropout=0.5, attention_dropout=0.5),
    "eps": lambda: create(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3)),
    "no_head": lambda: with_heads(nn.Identity()),
    "no_layers": lambda: with_heads(nn.Sequential()),
    "a_layer_as_head": lambda: with_heads(nn.Linear(48, 3)),
    "dropout_and_a_layer": lambda: with_heads(nn.Dropout(0.5), nn.Linear(48, 3, bias=False)),
}


@pytest.mark.parametrize("case", MODELS)
def test_native_size(case):
    model = MODELS[case]()
    description = support.described(model)
    x = support.images(3, 32, 32)
    support.assert_close(support.called(description, x), support.source(model, x))
    # The source takes no other image size either.
    assert not description.architecture.any_size
    with pytest.raises(AssertionError):
        support.source(model, support.images(3, 40, 32))


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_their_own_sizes(name):
    """What is read of the architectures that have names: nothing is computed, and the weights take no memory."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    a = support.families.family_of(model).describe(model).architecture
    patch = int(name[-2:])
    width, heads = {"b": (768, 12), "l": (1024, 16), "h": (1280, 16)}[name[4]]
    assert (a.patch, a.width, a.heads, a.depth) == ((patch, patch), width, heads, {"b": 12, "l": 24, "h": 32}[name[4]])
    assert (a.head_size, a.mlp_width, a.norm_eps, a.resize) == (width // heads, 4 * width, 1e-6, "torchvision")


def test_resized_as_interpolate_embeddings_does():
    """Their rule is for checkpoints: the description must give what a model of the new size gives with the resized table."""
    model = create()
    description = support.described(model)
    state = torchvision.models.vision_transformer.interpolate_embeddings(56, 8, dict(model.state_dict()))
    larger = VisionTransformer(**(SIZES | {"image_size": 56})).double().eval()
    larger.load_state_dict(state)
    x = support.images(3, 56, 56)
    request = support.families.by_name("torchvision").request(description.architecture, x)
    outputs = support.Outputs.parse(request.outputs, description.architecture)
    got = request.wrap(support.forward_reference(description, x, outputs))
    support.assert_close(got.detach(), support.source(larger, x))


def replaced(part, module):
    model = create()
    model.set_submodule(part, module)
    return model


REFUSED = {
    "conv_stem": (lambda: create(conv_stem_configs=[ConvStemConfig(16, 3, 2), ConvStemConfig(48, 3, 4)]), "conv_stem_configs"),
    "norm": (lambda: replaced("encoder.ln", nn.BatchNorm1d(48)), "encoder.ln is torch.nn.modules.batchnorm.BatchNorm1d"),
    "activation": (lambda: replaced("encoder.layers.encoder_layer_1.mlp.1", nn.ReLU()), "block 1's activation is .*ReLU"),
    "heads": (lambda: with_heads(nn.Linear(48, 9), nn.Linear(9, 4)), "the heads are Sequential"),
    "heads_activation": (lambda: with_heads(nn.Linear(48, 9), nn.ReLU(), nn.Linear(9, 4)), "heads' activation is .*ReLU"),
    "kdim": (
        lambda: replaced("encoder.layers.encoder_layer_0.self_attention", nn.MultiheadAttention(48, 3, add_bias_kv=True)),
        "block 0's attention is MultiheadAttention.* options of its own",
    ),
    "resnet": (lambda: torchvision.models.resnet18(), "resnet.ResNet is not supported"),
    "swin": (lambda: torchvision.models.swin_t(), "SwinTransformer is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    reason = support.refused(make().eval())
    assert re.search(message, reason, re.S), reason


def test_refused_changes():
    class Mine(VisionTransformer):
        def _process_input(self, x):
            return super()._process_input(x)

    assert "Mine overrides _process_input()" in support.refused(Mine(**SIZES))
