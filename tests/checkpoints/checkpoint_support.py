"""What the tests of checkpoints share: small models and their states."""

import copy

import google_files
import numpy as np
import torch

from vit_fast import Config, VisionTransformer

# The sizes of google_files.google_arrays: hidden 12, 3 heads, MLP 20, 2 layers, patches of 4×4, a 3×3 grid, 5 classes.
CLASSES = 5


def config(layers=2, hidden=12, heads=3, mlp=20):
    transformer = Config(mlp_dim=mlp, num_heads=heads, num_layers=layers, attention_dropout_rate=0.0, dropout_rate=0.1)
    return Config(patches=Config(size=(4, 4)), hidden_size=hidden, transformer=transformer, classifier="token")


def build(img_size=12, num_classes=CLASSES, seed=0, zero_head=False, **sizes):
    torch.manual_seed(seed)
    model = VisionTransformer(config(**sizes), img_size=img_size, num_classes=num_classes, zero_head=zero_head).eval()
    return model.apply(_add_noise)


def hybrid(seed=0, impl="google"):
    torch.manual_seed(seed)
    c = config()
    c.patches = Config(grid=(3, 3))
    c.resnet = Config(num_layers=(2, 1, 1), width_factor=0.5)
    return VisionTransformer(c, img_size=48, num_classes=CLASSES, hybrid_impl=impl).eval().apply(_add_noise)


def _add_noise(module):
    """So that no parameter is the zeros or ones it starts as."""
    with torch.no_grad():
        for p in module.parameters(recurse=False):
            p.add_(0.1 * torch.randn_like(p))


def _scramble(module):
    with torch.no_grad():
        for p in module.parameters(recurse=False):
            p.fill_(float("nan"))


def hybrid_arrays(seed=3):
    return google_files.google_arrays(patch=(1, 1), backbone=((2, 1, 1), 32), seed=seed)


def state_of(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


def without_class_position(arrays):
    table = arrays["Transformer/posembed_input/pos_embedding"].copy()
    table[:, 0] = 0
    return arrays | {"Transformer/posembed_input/pos_embedding": table}


def assert_google_logits(model, arrays, images):
    """In float64 what is left is the difference in summation order."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(images.double())[0].numpy()
    np.testing.assert_allclose(
        logits, google_files.google_logits(arrays, images.permute(0, 2, 3, 1).numpy()), rtol=1e-9, atol=1e-10
    )
