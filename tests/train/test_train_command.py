"""`vit-fast train`: what it prints, what it writes, and one line for whatever is wrong."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from train_support import SIZES

from vit_fast.cli import _parser, main
from vit_fast.train import Settings

SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()] + ["--no-tensorboard"]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["train", *map(str, arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return call


def test_it_trains(run, tmp_path):
    folder = tmp_path / "run"
    code, out, err = run("digits", "-o", folder, "--epochs", 2, "--lr", "3e-3", *SMALL)
    assert code == 0 and err == "" and "\x1b" not in out
    lines = out.splitlines()
    assert len(lines) == 4 and all(
        re.match(r"step +\d+/22  epoch .* validation: loss [\d.]+, [\d.]+ % right$", x) for x in lines[:2]
    )
    right = re.match(r"([\d.]+) % right of the images held out, after 22 steps in \d+ s", lines[2])
    assert right and 15 < float(right[1]) <= 100
    assert lines[3] == f"written: {folder / 'model.safetensors'}"
    assert (folder / "curve.png").is_file() and (folder / "log.csv").is_file()


def test_again_and_resumed(run, tmp_path):
    command = ("digits", "-o", tmp_path / "run", "--steps", 4, *SMALL)
    assert run(*command)[0] == 0
    code, out, err = run(*command)
    assert code == 2 and out == "" and "holds a run already: go on with it by --resume" in err and err.count("\n") == 1
    code, out, err = run(*command, "--resume")
    assert code == 0 and err == "" and "after 4 steps" in out


def test_the_file_serves_the_other_commands(run, tmp_path, capsys):
    import numpy as np
    from PIL import Image

    run("digits", "-o", tmp_path / "run", "--steps", 4, *SMALL)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "digit.png")
    assert main(["classify", str(tmp_path / "digit.png"), "--weights", str(tmp_path / "run" / "model.safetensors")]) == 0
    assert "ViT of 2 layers, 24 channels, 8x8 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nothing"], "there are no data 'nothing'"),
        (["digits", "--lr", "fast"], "argument --lr: a number is needed, got 'fast'"),
        (["digits", "--lr", "-1"], "lr must be above 0, got -1.0"),
        (["digits", "--batch", "0"], "argument --batch: a whole number from 1 on is needed"),
        (["digits", "--betas", "0.9"], "two numbers from 0 to below 1"),
        (["digits", "--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["digits", "--patch", "3"], "--img-size 8: the image size of ViT-Ti_16 is a multiple of its patches' 3 pixels"),
        (["digits", "--weights", "nothing.npz"], "nothing.npz"),
        (["digits", "--device", "cuda:99"], "there is no such device here"),
        (["digits", "--implementation", "fast"], "argument --implementation: invalid choice"),
        (["digits", "--parch", "3"], "unrecognized arguments"),
    ],
)
def test_refused_in_one_line(run, tmp_path, arguments, says):
    code, out, err = run(*arguments, "-o", tmp_path / "run", *([] if "--patch" in arguments else SMALL))
    assert code == 2 and out == "" and err.startswith("vit-fast: ") and err.count("\n") == 1
    assert says in err


def test_without_an_output(run):
    assert "required: -o/--output" in run("digits")[2]


def test_every_setting_is_an_option():
    """By its name; and what a run says of itself is taken again as what it was."""
    values = dict(
        data="digits", output="run", model="ViT-S_16", patch=4, hidden_size=48, layers=3, heads=3, mlp_dim=64, dropout=0.1,
        attention_dropout=0.2, stochastic_depth=0.3, weights="w.npz", img_size=(8, 16), mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7), epochs=3.5, steps=7, batch=12, accumulate=2, optimizer="sgd", lr=0.5, momentum=0.8,
        betas=(0.8, 0.9), weight_decay=0.1, schedule="linear", warmup=0.2, clip=2.0, label_smoothing=0.1, ema=0.5, crop=0.5,
        flip=True, rotate=3.0, shift=0.1, zoom=0.2, shear=4.0, mixup=0.3, hold_out=0.3,
        amp="bfloat16", gradient_checkpointing=True, compile=True, implementation="torch",
        parallel="fsdp", device="cpu", workers=2, seed=9, evaluate_every=3, checkpoint_every=5, log_every=2, keep=4,
    )  # fmt: skip
    settings = Settings(**values)
    assert set(values) == {field.name for field in dataclasses.fields(Settings)} - {"tensorboard"}
    assert all(getattr(settings, field.name) != field.default for field in dataclasses.fields(Settings) if field.name in values)
    arguments = _parser().parse_args(["train", *settings.as_arguments()])
    assert {name: getattr(arguments, name) for name in values} == values
    assert (
        not hasattr(arguments, "tensorboard") and _parser().parse_args(["train", "x", "-o", "y", "--tensorboard"]).tensorboard
    )


def test_a_process(tmp_path):
    """With a terminal's absence no live line; and torchrun's variables of one process change nothing."""
    command = [sys.executable, "-m", "vit_fast", "train", "digits", "-o", str(tmp_path / "run"), "--steps", "2", *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "after 2 steps" in result.stdout
    assert torch.load(tmp_path / "run" / "checkpoint-00000002.pt", weights_only=True)["step"] == 2
