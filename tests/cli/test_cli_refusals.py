"""The command line: what it can't do it says in a line, and every terminal can read it."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from cli_support import DEMO, GRAY, SMALL, tiny
from PIL import Image

from vit_fast import CONFIGS, VisionTransformer, info, inputs, terminal
from vit_fast.cli import main

# ---- What can't be done ---------------------------------------------------------------------------------------------

REFUSALS = {
    "unknown command": ("clasify x", "invalid choice: 'clasify'"),
    "unknown option": ("info --speed", "unrecognized arguments: --speed (see vit-fast"),
    "missing argument": ("classify", "required: IMAGE, --weights"),
    "unknown model": ("verify --model ViT-B16", "no model 'ViT-B16'. Did you mean ViT-B_16"),
    "timm's name": ("verify --model vit_large_patch16", "There are ViT-Ti_16, "),
    "image size": ("verify --img-size huge", "224x384 (height x width), got 'huge'"),
    "image size 0": ("verify --img-size 0", "pixels from 1 to 4096"),
    "no multiple": ("verify --model ViT-H_14 --img-size 225", "a multiple of its patches' 14 pixels: try 224 or 238"),
    "below a patch": ("verify --model ViT-Ti_16 --img-size 8", "try 16"),
    "batch": ("verify --batch 0", "a whole number from 1 on is needed, got '0'"),
    "batches": ("demo --batch 1,many", "got 'many'"),
    "batch and pictures": ("verify {picture} --batch 3", "leave it out, or the pictures"),
    "dtype": ("verify --dtype int8", "'int8'"),
    "device": ("verify --device gpu", "no such device here; there is "),
    "mean": ("verify --mean 1,2", "one number, or three"),
    "std": ("verify --std 0", "above 0"),
    "no picture": ("classify {folder}/none.jpg --weights {weights}", "no such picture: "),
    "folder": ("classify {folder} --weights {weights}", "is a folder: name the pictures in it"),
    "text": ("classify {text} --weights {weights}", "is no picture that Pillow can read"),
    "float picture": ("classify {float} --weights {weights}", "floating-point pixels"),
    "no weights": ("classify {picture} --weights {folder}/none.npz", "no such file: "),
    "weights are text": ("classify {picture} --weights {text}", "no file by torch.save"),
    "weights of timm": ("classify {picture} --weights {timm}", "holds no Vision Transformer"),
    "an odd size": ("classify {picture} --weights {odd}", "no model here has 3 layers, 24 channels"),
    "another model": ("classify {picture} --weights {weights} --model ViT-S_16", "does not fit the model"),
    "headless": ("classify {picture} --weights {headless}", "has no head"),
    "no labels": ("classify {picture} --weights {weights} --labels {folder}/none", "no such file with labels"),
    "labels are a picture": ("classify {picture} --weights {weights} --labels {picture}", "is not UTF-8 text"),
    "too few labels": ("classify {picture} --weights {weights} --labels {text}", "has 1 labels, the weights have 5 classes"),
    "broken JSON": ("classify {picture} --weights {weights} --labels {json}", "begins as JSON, but is not"),
    "JSON keys": ("classify {picture} --weights {weights} --labels {keys}", "must have whole numbers as keys"),
    "JSON index": ("classify {picture} --weights {weights} --labels {index}", "names class 5, the weights have"),
    "topk": ("classify {picture} --weights {weights} --topk 0", "got '0'"),
    "layer": ("attention-map {picture} -o {out} --weights {weights} --layer 12", "has 12 layers, 0 to 11, or -1 to -12"),
    "negative layer": ("attention-map {picture} -o {out} --weights {weights} --layer -13", "--layer -13: "),
    "head": ("attention-map {picture} -o {out} --weights {weights} --head 3", "ViT-Ti_16 has 3 heads, 0 to 2, or 'mean'"),
    "head's name": ("attention-map {picture} -o {out} --head max", "'mean' or the number of a head"),
    "rollout of a layer": ("attention-map {picture} -o {out} --rollout --layer 2", "leave out --layer and --head"),
    "rollout of a head": ("attention-map {picture} -o {out} --rollout --head mean", "leave out --layer and --head"),
    "no folder": ("attention-map {picture} -o {folder}/none/map.png", "there is no folder"),
    "output is a folder": ("attention-map {picture} -o {folder}", "is a folder: name a file in it"),
    "format": ("attention-map {picture} -o {folder}/map.xyz", "must end in .png, .jpg, .jpeg, .webp"),
    "onto itself": ("attention-map {picture} -o {picture}", "is the picture itself"),
    "demo's output": ("demo -o {folder}/none/map.png", "there is no folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(folder, weights, pictures):
    files = {"folder": folder, "weights": weights, "picture": pictures[0], "out": folder / "out.png"}
    for name, text in {
        "text": "no picture\n",
        "json": '{"0": ',
        "keys": '{"cat": 0}',
        "index": '{"0": "cat", "5": "dog"}',
    }.items():
        files[name] = folder / f"{name}.txt"
        files[name].write_text(text)
    files["float"] = folder / "float.tiff"
    Image.fromarray(GRAY.astype(np.float32)).save(files["float"])
    state = tiny().state_dict()
    contents = {
        "headless": {key: value for key, value in state.items() if not key.startswith("head")},
        "timm": {"cls_token": torch.zeros(1, 1, 192), "blocks.0.attn.qkv.weight": torch.zeros(576, 192)},
        "odd": odd_state(),
    }
    for name, content in contents.items():
        files[name] = folder / f"{name}.pt"
        torch.save(content, files[name])
    return files


def odd_state():
    config = copy.deepcopy(CONFIGS["ViT-Ti_16"])
    config.hidden_size = config.transformer.mlp_dim = 24
    config.transformer.num_layers = 3
    return VisionTransformer(config, img_size=32, num_classes=2).state_dict()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case, refused, places):
    command, expected = REFUSALS[case]
    message = refused(*(part.format(**places) for part in command.split()))
    assert expected in message and len(message) < 700


def test_an_output_that_can_not_be_written(refused, run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.os, "access", lambda path, mode: False)  # root may write anywhere
    message = refused("attention-map", pictures[0], "-o", tmp_path / "map.png", *SMALL)
    assert "map.png can't be written: permission denied" in message
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    message = refused("attention-map", pictures[0], "-o", tmp_path / "map.png", *SMALL)
    assert "map.png can't be written: No space left on device" in message


def test_demo_whose_folder_can_not_be_made(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").write_text("a file")
    assert "demo-output can't be made" in refused(*DEMO)


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: there is no such device here; there is cpu" in refused("verify", *SMALL, "--device", "cuda")


def test_interrupted(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "show", interrupt)
    assert run("info") == (130, "", "vit-fast: interrupted\n")


def test_memory(refused, monkeypatch):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
    ):
        monkeypatch.setattr(info, "show", lambda error=error: (_ for _ in ()).throw(error))
        assert "not enough memory: try fewer images" in refused("info")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(info, "show", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


# ---- The terminal ---------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.styled("x", "red") == "x"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert terminal.styled("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.styled("x", "red") == "x"


@pytest.mark.parametrize("with_rich", [True, False])
@pytest.mark.parametrize("total", [3, None])
def test_progress(with_rich, total, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with terminal.progress("counting", total) as advance:
        for _ in range(3):
            advance()
    assert "counting" in err.getvalue()
    if total:
        assert "100" in err.getvalue()
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    with terminal.progress("counting", total) as advance:
        advance()
    assert quiet.getvalue() == ""


def test_table_lines_up():
    text = terminal.table(("", "size", "verdict"), [("a", "1", "ok"), ("longer", "123", "OVER")], styles=["green", "red"])
    assert text.splitlines() == ["          size  verdict", "  a          1       ok", "  longer   123     OVER"]


@pytest.mark.parametrize("fraction, full", [(0.0, 0), (0.5, 5), (1.0, 10)])
def test_bar(fraction, full, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert terminal.bar(fraction, 10) == "█" * full + " " * (10 - full)
    assert terminal.bar(0.05, 10).startswith("▌")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert terminal.bar(fraction, 10) == "#" * full + " " * (10 - full)


def test_one_line():
    assert terminal.one_line("a\n  b\n  c") == "a; b; c"
    assert terminal.one_line("a:\n" + "\n".join(f"  {i}" for i in range(9))) == "a: 0; 1; 2; and 6 more"
    assert terminal.one_line(ValueError()) == "ValueError"
