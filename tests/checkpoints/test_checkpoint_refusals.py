"""Checkpoints that do not fit or can't be read are refused with a message, and the model stays as it was."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_support import CLASSES, assert_same_state, build, config, hybrid, hybrid_arrays, state_of

from vit_fast import VisionTransformer
from vit_fast.checkpoints import CheckpointError, load, load_npz, save

# ---- What does not fit ----------------------------------------------------------------------------------------------


def test_one_error_lists_everything_and_changes_nothing():
    model, source = build(layers=4), build(layers=4, seed=1).state_dict()
    before = state_of(model)
    layer = "transformer.encoder.layer."
    for i in (1, 2):
        for part in ("ffn.fc1.weight", "ffn.fc1.bias"):
            del source[f"{layer}{i}.{part}"]
    for i in (0, 1, 3):
        source[f"{layer}{i}.attn.out.bias"] = torch.zeros(13)
    del source["transformer.encoder.encoder_norm.bias"]
    source["transformer.embeddings.cls_token"] = "text"
    source["transformer.encoder.encoder_norm.weight"] = torch.ones(12, dtype=torch.int64)
    source["head.bias"] = np.array(["a"] * 5)
    source |= {"dist_token": torch.ones(1), f"{layer}4.ffn.fc1.bias": torch.ones(20)}
    with pytest.raises(CheckpointError) as error:
        load(model, source)
    assert str(error.value).split("\n") == [
        "the mapping does not fit the model; nothing was loaded:",
        "  missing: transformer.encoder.encoder_norm.bias",
        "  missing: transformer.encoder.layer.{1-2}.{ffn.fc1.weight, ffn.fc1.bias}",
        "  unexpected: dist_token",
        "  unexpected: transformer.encoder.layer.4.ffn.fc1.bias",
        "  transformer.embeddings.cls_token: is a str, a tensor is needed",
        "  transformer.encoder.layer.{0-1,3}.attn.out.bias: [13] in the file, [12] in the model",
        "  transformer.encoder.encoder_norm.weight: is of dtype int64, floating-point numbers are needed",
        "  head.bias: is of dtype <U1, floating-point numbers are needed",
    ]
    assert isinstance(error.value, ValueError)
    assert_same_state(model, before)


def test_everything_that_is_wrong_with_googles_arrays(arrays):
    model = build(layers=3)
    before = state_of(model)
    arrays["Transformer/encoderblock_0/LayerNorm_0/scale"] = np.array([None] * 12)
    arrays["embedding/bias"] = np.ones(12, dtype=np.complex64)
    arrays["embedding/kernel"] = np.ones((4, 4, 3), dtype=np.float32)
    arrays["MAPHead_0/probe"] = np.ones((1, 1, 12))
    with pytest.raises(CheckpointError) as error:
        load(model, arrays)
    message = str(error.value)
    for line in (
        "missing: transformer.encoder.layer.2.{attention_norm.weight, attention_norm.bias, ffn_norm.weight",
        "unexpected: MAPHead_0/probe",
        "transformer.encoder.layer.0.attention_norm.weight: is of dtype object",
        "patch_embeddings.bias: is of dtype complex64",
        "patch_embeddings.weight: [4, 4, 3] in the file, [12, 3, 4, 4] in the model",
    ):
        assert line in message, message
    assert_same_state(model, before)


def test_another_number_of_heads(arrays):
    """Equal shapes, another network: only Google's kernels tell."""
    with pytest.raises(CheckpointError, match="attention: the file has 3 heads, the model 4"):
        load(build(heads=4), arrays)


def test_tensors_without_values():
    source = build().state_dict()
    source["head.bias"] = torch.zeros(5, device="meta")
    source["head.weight"] = torch.zeros(5, 12).to_sparse()
    with pytest.raises(CheckpointError) as error:
        load(build(), source)
    assert "head.bias: is a meta tensor" in str(error.value) and "head.weight: is a sparse tensor" in str(error.value)


def test_hybrids_and_plain_models_mixed_up(arrays):
    with pytest.raises(CheckpointError, match="hint: the file is a hybrid's") as error:
        load(build(), hybrid_arrays())
    assert "hybrid_model.body.block1.unit{1-2}.{conv1.weight, conv2.weight" in str(error.value)
    with pytest.raises(CheckpointError, match="hint: the model is a hybrid"):
        load(hybrid(), arrays)


def test_a_model_without_memory(npz):
    with torch.device("meta"):
        model = VisionTransformer(config(), img_size=12, num_classes=CLASSES)
    with pytest.raises(CheckpointError, match="meta device .* model.to_empty"):
        load(model, npz)


def test_sources_that_are_none():
    with pytest.raises(TypeError, match="source must be a path or a mapping of names to arrays, got list"):
        load(build(), [1])
    with pytest.raises(CheckpointError, match="missing: head.weight"):
        load(build(), {})


# ---- Files that can't be read ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.bin"])
def test_unreadable_files(tmp_path, name):
    model = build()
    before = state_of(model)
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=f"no such file: .*{name}"):
        load(model, path)
    for content in (b"", b"no weights at all", b"PK\x03\x04 nor here", b"\x80\x04nor here"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is "):
            load(model, path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder"):
        load(model, path)
    assert_same_state(model, before)


def test_damaged_files(npz, tmp_path):
    content = bytearray(npz.read_bytes())
    (tmp_path / "short.npz").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="short.npz is not an .npz file, or it is damaged"):
        load(build(), tmp_path / "short.npz")
    content[content.find(b"cls.npy") + 200] ^= 255  # a bit of the class token
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="flipped.npz is damaged: cls can't be read"):
        load(build(), tmp_path / "flipped.npz")
    path = save(build(), tmp_path / "short.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="short.safetensors is not a safetensors file, or it is damaged"):
        load(build(), path)
    torch.save(build().state_dict(), tmp_path / "short.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="short.pt is damaged"):
        load(build(), tmp_path / "short.pt")
    np.save(tmp_path / "single.npy", np.ones(3))
    with pytest.raises(CheckpointError, match="holds a single array"):
        load_npz(tmp_path / "single.npy")


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_content_is_refused(arrays, tmp_path):
    mark = tmp_path / "unpickled"
    arrays["head/bias"] = np.array([Bomb(mark)] * 5, dtype=object)
    arrays["cls"] = np.array([Bomb(mark)], dtype=object)
    np.savez(tmp_path / "bomb.npz", **arrays)
    with pytest.raises(CheckpointError, match="pickled Python objects, which are not loaded .*: cls, head/bias"):
        load(build(), tmp_path / "bomb.npz")
    with np.load(tmp_path / "bomb.npz") as weights, pytest.raises(CheckpointError, match="cls can't be read: Object arrays"):
        load(build(), weights)
    torch.save({"head.bias": Bomb(mark)}, tmp_path / "bomb.bin")
    with pytest.raises(CheckpointError, match="Python objects other than tensors, which are not loaded"):
        load(build(), tmp_path / "bomb.bin")
    torch.save(build(), tmp_path / "whole_model.pt")
    with pytest.raises(CheckpointError, match=r"save its state_dict\(\)"):
        load(build(), tmp_path / "whole_model.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="must hold a state dict, it holds a list"):
        load(build(), tmp_path / "list.pt")
    assert not mark.exists()


def test_import_needs_none_of_the_extras():
    code = (
        "import sys, vit_fast.checkpoints; "
        "print([m for m in ('scipy', 'safetensors', 'ml_collections', 'ml_dtypes') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "[]", result.stderr
