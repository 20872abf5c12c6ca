"""What the tests of training share: a model and data small enough for hundreds of steps a second."""

import numpy as np
import torch

from vit_fast.train import Data, Images, Settings, train

SIZES = dict(patch=4, hidden_size=24, layers=2, heads=2, mlp_dim=32, dropout=0.0)


def spots(count, seed=0, side=8):
    """Gray images whose class is the quarter that a bright spot lies in: learned in seconds, wrong at first."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = rng.integers(0, 90, (count, 1, side, side), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        y, x = rng.integers(0, side // 2 - 1, 2) + np.array([label // 2, label % 2]) * side // 2
        image[0, y : y + 2, x : x + 2] = 255
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def shades(count, seed=0):
    """Gray images whose class is how bright they are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = 35 + 60 * labels[:, None, None, None] + rng.integers(-30, 31, (count, 1, 8, 8))
    return Images(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))


def small_data(train_count=96, seed=0):
    return Data(spots(train_count, seed), spots(64, seed + 1), list("abcd"))


def small(folder, **changes):
    """Settings of a run of 24 steps."""
    standard = dict(SIZES, output=str(folder), batch=16, steps=24, lr=3e-3, evaluate_every=8, tensorboard=False, keep=2)
    return Settings(**{**standard, **changes})


def run(folder, *, data=None, model=None, resume=False, after_step=None, **changes):
    return train(small(folder, **changes), data=data or small_data(), model=model, resume=resume, after_step=after_step)


def weights_of(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close_weights(a, b, rtol, atol):
    """All but the keys' biases. Adding to all of a query's scores changes no softmax, so the gradient of these is zero in exact
    arithmetic; what is computed is rounding, and Adam makes steps of it that are as long as any other's.
    """
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith("attn.key.bias"):
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class Killed(Exception):
    pass


def killed_after(steps):
    """Ends the run the hard way: nothing of it may tidy up."""

    def after_step(done):
        if done == steps:
            raise Killed

    return after_step
