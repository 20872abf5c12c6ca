"""Weights in and out: Google's layouts, state dicts, safetensors, position tables; and that a failed load changes nothing."""

import copy
import os
import stat
import sys
import warnings
from pathlib import Path

import google_files
import numpy as np
import pytest
import torch
from checkpoint_support import (
    _scramble,
    assert_google_logits,
    assert_same_state,
    build,
    hybrid,
    hybrid_arrays,
    state_of,
    without_class_position,
)
from scipy import ndimage
from torch import nn

from vit_fast import CONFIGS, VisionTransformer, checkpoints
from vit_fast.checkpoints import CheckpointError, load, load_npz, resize_position_embeddings, save
from vit_fast.testing import randn

# ---- Position tables ------------------------------------------------------------------------------------------------


def zoomed(table, old, new, **options):
    grid = table[0, 1:].numpy().reshape(*old, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy mentions the change of its rounding in 2013
        grid = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1, **options)
    return torch.cat([table[:, :1], torch.from_numpy(grid.reshape(1, new[0] * new[1], -1))], dim=1)


GRIDS = [
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((7, 7), (12, 12)),
    ((16, 16), (37, 37)),
    ((14, 14), (7, 28)),
    ((3, 11), (11, 3)),
    ((5, 9), (5, 10)),
    ((1, 1), (3, 4)),
    ((4, 6), (1, 1)),
    ((1, 8), (6, 5)),
    ((9, 2), (1, 17)),
    ((64, 64), (63, 61)),
]


@pytest.mark.parametrize("old, new", GRIDS)
def test_resize_is_scipys_zoom(old, new):
    table = randn(1, 1 + old[0] * old[1], 3, seed=old[0] + new[1])
    resized = resize_position_embeddings(table, old, new)
    assert resized.dtype == table.dtype
    torch.testing.assert_close(resized, zoomed(table, old, new), rtol=0, atol=1e-5)


def test_resize_for_every_pair_of_sizes():
    for old in range(1, 40):
        table = randn(1, 1 + old, 1, seed=old)
        for new in range(1, 66):
            resized = resize_position_embeddings(table, (old, 1), (new, 1))
            expected = zoomed(table, (old, 1), (new, 1), mode="nearest")
            torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5, msg=f"{old} to {new}")


@pytest.mark.parametrize("old, new", [(16, 30), (24, 22), (28, 27)])
def test_resize_does_not_lose_the_last_row_as_scipys_default_mode_does(old, new):
    table = 1 + randn(1, 1 + old * old, 2).abs()
    theirs = zoomed(table, (old, old), (new, new))[0, 1:].unflatten(0, (new, new))
    ours = resize_position_embeddings(table, (old, old), (new, new))[0, 1:].unflatten(0, (new, new))
    assert not theirs[-1].any() and not theirs[:, -1].any()  # the fault, should scipy mend it this test says so
    torch.testing.assert_close(ours[:-1, :-1], theirs[:-1, :-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[-1, -1], table[0, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_resize_dtypes(dtype, device):
    table = randn(1, 10, 4, dtype=dtype, device=device)
    exact = resize_position_embeddings(table.double(), (3, 3), (5, 4))
    resized = resize_position_embeddings(table, (3, 3), (5, 4))
    assert resized.dtype == dtype and resized.device == table.device
    assert torch.equal(resized, exact.to(dtype))  # rounded once


def test_resize_prefix_rows_and_identity():
    table = randn(1, 2 + 6, 3)
    resized = resize_position_embeddings(table, (2, 3), (4, 4), num_prefix=2)
    assert torch.equal(resized[:, :2], table[:, :2]) and resized.shape == (1, 18, 3)
    without = resize_position_embeddings(table[:, 2:], (2, 3), (4, 4), num_prefix=0)
    assert torch.equal(without, resized[:, 2:])
    assert resize_position_embeddings(table, (2, 3), (2, 3), num_prefix=2) is table


def test_resize_is_differentiable_and_compiles():
    torch._dynamo.reset()
    table = randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize_position_embeddings(t, (2, 3), (3, 5)), table)
    compiled = torch.compile(resize_position_embeddings, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(table, (2, 3), (3, 5)), resize_position_embeddings(table, (2, 3), (3, 5)))


def test_resize_refuses():
    with pytest.raises(ValueError, match=r"table must be \[1, 10, D\] for a 3x3 grid and 1 prefix rows, got \[1, 9, 4\]"):
        resize_position_embeddings(torch.zeros(1, 9, 4), (3, 3), (4, 4))
    with pytest.raises(ValueError, match="at least one patch, got 3x3 and 0x4"):
        resize_position_embeddings(torch.zeros(1, 10, 4), (3, 3), (0, 4))


# ---- Google's files -------------------------------------------------------------------------------------------------


def test_google_file_gives_googles_logits(npz, arrays):
    model, images = build(), randn(2, 3, 12, 12)
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert load(model, npz) is model
    assert_google_logits(model, arrays, images)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identities


def test_the_originals_call(npz, arrays):
    """``model.load_from(np.load(path))``, with the mapping that numpy reads lazily, or with a path."""
    model, images = build(), randn(1, 3, 12, 12)
    with np.load(npz) as weights:
        model.load_from(weights)
    assert_google_logits(model, arrays, images)
    other = build(seed=1)
    other.load_from(str(npz))
    assert_same_state(other, state_of(model))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix", ["", "params/", "params/img/", "opt/target/"])
@pytest.mark.parametrize("class_row", [False, True])
def test_big_vision_files(arrays, tmp_path, stacked, prefix, class_row):
    if not class_row:
        arrays = without_class_position(arrays)
    variant = google_files.big_vision_arrays(arrays, stacked=stacked, prefix=prefix, class_row=class_row)
    if "params/" in prefix:
        variant["opt/0/count"] = np.array(7)
    if "img/" in prefix:
        variant |= {"params/txt/head/kernel": np.ones((3, 3)), "params/t": np.ones(1)}
    np.savez(tmp_path / "big_vision.npz", **variant)
    model = build()
    load(model, tmp_path / "big_vision.npz")
    assert_google_logits(model, arrays, randn(2, 3, 12, 12))
    row = model.transformer.embeddings.position_embeddings[0, 0]
    assert class_row == bool(row.any())


def test_load_npz_names_arrays_as_the_original_does(arrays, tmp_path):
    arrays = without_class_position(arrays)
    variant = google_files.big_vision_arrays(arrays, stacked=True, prefix="params/")
    np.savez(tmp_path / "big_vision.npz", **variant)
    names = set(arrays) - {"Transformer/posembed_input/pos_embedding"} | {"pos_embedding"}
    loaded = load_npz(tmp_path / "big_vision.npz")
    assert set(loaded) == names
    name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    assert np.array_equal(loaded[name], arrays[name])
    model = build()
    load(model, loaded)
    assert_google_logits(model, arrays, randn(1, 3, 12, 12))


@pytest.mark.parametrize("name", ["bfloat16", "float16", ">f4", "float64"])
def test_dtypes_of_files(arrays, tmp_path, name):
    """numpy saves bfloat16, which it does not know, as two-byte voids."""
    if name == "bfloat16":
        halves = {k: torch.from_numpy(a).bfloat16() for k, a in arrays.items()}
        exact = {k: t.float().numpy() for k, t in halves.items()}
        written = {k: t.view(torch.uint16).numpy().view("V2") for k, t in halves.items()}
    else:
        written = {k: a.astype(name) for k, a in arrays.items()}
        exact = {k: a.astype(np.float64) for k, a in written.items()}
    np.savez(tmp_path / "file.npz", **written)
    model = build().double()
    load(model, tmp_path / "file.npz")
    assert_google_logits(model, exact, randn(1, 3, 12, 12))


def test_arrays_that_torch_does_not_take_as_they_are(arrays):
    views = {name: np.flip(np.ascontiguousarray(np.flip(array))) for name, array in arrays.items()}  # negative strides
    views["cls"] = arrays["cls"].view()
    views["cls"].flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(build(), views)
    assert_same_state(model, state_of(load(build(), arrays)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_import_into_the_models_dtype_and_device(npz, arrays, dtype, device):
    model = build().to(device, dtype)
    load(model, npz)
    query = model.transformer.encoder.layer[1].attn.query.weight
    kernel = arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"]
    assert query.dtype == dtype and query.device.type == torch.device(device).type
    assert torch.equal(query.cpu(), torch.from_numpy(kernel.reshape(12, 12).T).to(dtype))


def test_the_packed_projection_sees_what_was_loaded(npz, arrays):
    """Attention keeps query, key and value in one block of memory: loading writes into it."""
    model, images = build(), randn(1, 3, 12, 12)
    attn = model.transformer.encoder.layer[0].attn
    load(model, npz)
    assert attn._packed.matches(attn.query, attn.key, attn.value)
    with torch.no_grad():
        logits = model(images)[0]
    expected = google_files.google_logits(arrays, images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_hybrid_file_gives_googles_logits(tmp_path):
    arrays, images = hybrid_arrays(), randn(2, 3, 48, 48)
    np.savez(tmp_path / "hybrid.npz", **arrays)
    model = load(hybrid(), tmp_path / "hybrid.npz")
    pixels = images.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        logits = model.double()(images.double())[0].numpy()
    expected = google_files.google_logits(arrays, pixels, google_files.google_features(arrays, pixels))
    np.testing.assert_allclose(logits, expected, rtol=1e-8, atol=1e-9)
    load(hybrid(impl="original"), tmp_path / "hybrid.npz")  # the same weights fit both networks


def test_round_trip_through_googles_layout(tmp_path):
    for model in (build(), hybrid()):
        np.savez(tmp_path / "out.npz", **checkpoints.to_google(model))
        assert_same_state(load(copy.deepcopy(model).apply(_scramble), tmp_path / "out.npz"), state_of(model))


def test_to_google_is_the_inverse(arrays):
    back = checkpoints.to_google(checkpoints.from_google(arrays), num_heads=3)
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], array) and back[name].shape == array.shape for name, array in arrays.items())
    with pytest.raises(ValueError, match="to_google: a state dict does not tell the number of heads"):
        checkpoints.to_google(checkpoints.from_google(arrays))
    with pytest.raises(KeyError, match="no name for extra.weight"):
        checkpoints.to_google({"extra.weight": torch.ones(1)}, num_heads=3)


@pytest.mark.parametrize("n_block", [1, "1"])
def test_block_load_from(arrays, npz, n_block):
    with np.load(npz) as weights:
        block = build().transformer.encoder.layer[0]
        block.load_from(weights, n_block)
    whole = load(build(), arrays).transformer.encoder.layer[1]
    assert_same_state(block, state_of(whole))

    before = state_of(block)
    del arrays["Transformer/encoderblock_0/LayerNorm_2/bias"]
    arrays["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"] = np.ones((12, 21), dtype=np.float32)
    arrays["Transformer/encoderblock_0/gate"] = np.ones(3)
    with pytest.raises(CheckpointError, match=r"Transformer/encoderblock_0/… do not fit the Block") as error:
        block.load_from(arrays, 0)
    assert "missing: ffn_norm.bias" in str(error.value)
    assert "ffn.fc1.weight: [21, 12] in the file, [20, 12] in the model" in str(error.value)
    assert "unexpected: Transformer/encoderblock_0/gate" in str(error.value)
    assert_same_state(block, before)


# ---- Heads ----------------------------------------------------------------------------------------------------------


def test_zero_head_as_the_original(npz):
    model = build(num_classes=7, zero_head=True)
    load(model, npz)
    assert not model.head.weight.any() and not model.head.bias.any()
    assert_same_state(model.transformer, state_of(load(build(), npz).transformer))


def test_zero_head_reads_the_head_of_a_state_dict(tmp_path):
    """The original fine-tunes a model built so and loads the result with load_state_dict: its head is the point."""
    tuned = build(zero_head=True, seed=1)
    model = load(build(zero_head=True), save(tuned, tmp_path / "tuned.safetensors"))
    assert_same_state(model, state_of(tuned))


def test_head_mismatch_and_drop(npz):
    model = build(num_classes=7)
    before = state_of(model)
    with pytest.raises(CheckpointError) as error:
        load(model, npz)
    message = str(error.value)
    assert "head.weight: [5, 12] in the file, [7, 12] in the model" in message
    assert "head.bias: [5] in the file, [7] in the model" in message
    assert "the file's head has 5 classes, the model's 7" in message and "num_classes=5" in message and "head='drop'" in message
    assert_same_state(model, before)

    load(model, npz, head="drop")
    assert torch.equal(model.head.weight, before["head.weight"])
    assert_same_state(model.transformer, state_of(load(build(), npz).transformer))
    with pytest.raises(ValueError, match="head must be 'strict' or 'drop', got 'keep'"):
        load(model, npz, head="keep")


def test_file_without_head(arrays):
    del arrays["head/kernel"], arrays["head/bias"]
    with pytest.raises(CheckpointError, match="the file has no head; pass head='drop'"):
        load(build(), arrays)
    load(build(), arrays, head="drop")


def test_pre_logits_are_left_out(arrays):
    arrays |= {"pre_logits/kernel": np.ones((12, 12), np.float32), "pre_logits/bias": np.ones(12, np.float32)}
    model = build()
    with pytest.warns(UserWarning, match="has a pre_logits layer, which this model lacks"):
        load(model, arrays)
    assert_google_logits(model, arrays, randn(1, 3, 12, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, arrays, head="drop")
        load(build(zero_head=True), arrays)
        load(model, arrays | {"head/kernel": np.zeros((12, 5), np.float32)})  # as Google's ImageNet-21k files


# ---- Other image sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_size, grid", [(20, (5, 5)), ((8, 24), (2, 6)), ((4, 36), (1, 9))])
def test_position_table_of_another_grid(npz, arrays, img_size, grid):
    """(1, 9) has as many patches as (3, 3): only the file's grid, when given, tells them apart."""
    model = build(img_size=img_size)
    load(model, npz, grid=(3, 3))
    table = torch.from_numpy(arrays["Transformer/posembed_input/pos_embedding"])
    resized = zoomed(table, (3, 3), grid, mode="nearest")
    torch.testing.assert_close(model.transformer.embeddings.position_embeddings.detach(), resized, rtol=0, atol=1e-5)
    if grid != (1, 9):
        assert_same_state(load(build(img_size=img_size, seed=5), npz), state_of(model))


def test_oblong_tables():
    arrays = google_files.google_arrays(grid=(2, 4))
    same = load(build(img_size=(8, 16)), arrays)
    assert_google_logits(same, arrays, randn(1, 3, 8, 16))
    with pytest.raises(CheckpointError, match=r"8 patches are no square grid: pass the file's grid=\(h, w\)"):
        load(build(), arrays)
    model = load(build(), arrays, grid=(2, 4))
    table = torch.from_numpy(arrays["Transformer/posembed_input/pos_embedding"])
    torch.testing.assert_close(
        model.transformer.embeddings.position_embeddings.detach(), zoomed(table, (2, 4), (3, 3)), rtol=0, atol=1e-5
    )
    with pytest.raises(CheckpointError, match="the file has 8 patches, a grid of 3x4 has 12"):
        load(model, arrays, grid=(3, 4))


def test_oblong_tables_of_big_vision():
    arrays = without_class_position(google_files.google_arrays(grid=(2, 4)))
    variant = google_files.big_vision_arrays(arrays)
    assert_google_logits(load(build(img_size=(8, 16)), variant), arrays, randn(1, 3, 8, 16))
    with pytest.raises(CheckpointError, match="pos_embedding has 8 rows, no square grid"):
        load(build(), variant)
    load(build(), variant, grid=(2, 4))
    # 16 rows: 4×4 patches, or a class token and 3×5. The model or the caller decides.
    table = np.ones((1, 16, 12), np.float32)
    assert checkpoints.from_google({"pos_embedding": table})["transformer.embeddings.position_embeddings"].shape[1] == 17
    assert checkpoints.from_google({"pos_embedding": table}, grid=(3, 5))[
        "transformer.embeddings.position_embeddings"
    ].shape == (1, 16, 12)


def test_half_precision_tables_are_rounded_once(tmp_path):
    source = build().half()
    torch.save(source.state_dict(), tmp_path / "half.bin")
    model = load(build(img_size=20), tmp_path / "half.bin")
    table = source.transformer.embeddings.position_embeddings.detach().float()
    expected = resize_position_embeddings(table, (3, 3), (5, 5))
    assert torch.equal(model.transformer.embeddings.position_embeddings, expected)


# ---- State dicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_torch_files(tmp_path, name):
    source = build(seed=1)
    torch.save(source.state_dict(), tmp_path / name)
    assert_same_state(load(build(), tmp_path / name), state_of(source))


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": s, "optimizer": {}},
    lambda s: {"model_state_dict": {f"module.{k}": t for k, t in s.items()}},
    lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()},
    lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
])  # fmt: skip
def test_wrapped_state_dicts(tmp_path, wrap):
    source = build(seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / "wrapped.pt")
    assert_same_state(load(build(), tmp_path / "wrapped.pt"), state_of(source))
    assert_same_state(load(build(), wrap(source.state_dict())), state_of(source))


def test_wrapped_models(tmp_path):
    source = build(seed=1)
    compiled = torch.compile(build(), backend="eager")
    load(compiled, source.state_dict())
    assert_same_state(compiled._orig_mod, state_of(source))

    class DistributedStandIn(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    path = save(DistributedStandIn(source), tmp_path / "model.safetensors")
    assert checkpoints.read_state_dict(path).keys() == source.state_dict().keys()


def test_save_round_trip(tmp_path):
    for i, source in enumerate((build(seed=1), hybrid(seed=1), build(seed=2).to(torch.bfloat16))):
        path = save(source, tmp_path / f"{i}.safetensors")
        assert path == tmp_path / f"{i}.safetensors"
        assert_same_state(load(copy.deepcopy(source).apply(_scramble), path), state_of(source))
        assert_same_state(source, checkpoints.read_state_dict(path))
        source.load_state_dict(checkpoints.read_state_dict(path), strict=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "2.safetensors"]


def test_tied_weights_are_saved(tmp_path):
    source = build()
    source.transformer.encoder.layer[1].ffn.fc1.weight = source.transformer.encoder.layer[0].ffn.fc1.weight
    loaded = load(build(seed=3), save(source, tmp_path / "tied.safetensors"))
    assert_same_state(loaded, state_of(source))


def test_metadata_and_grid(tmp_path):
    from safetensors import safe_open

    source = build(img_size=(8, 32))
    path = save(source, tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    sizes = {"num_classes": "5", "num_heads": "3", "image_size": "8x32", "grid": "2x8"}
    assert metadata == {"format": "pt", "library": "vit_fast", **sizes}
    # The file knows that its 16 patches are 2×8, not 4×4.
    model = load(build(img_size=16), path)
    expected = resize_position_embeddings(source.transformer.embeddings.position_embeddings, (2, 8), (4, 4))
    assert torch.equal(model.transformer.embeddings.position_embeddings, expected)
    with torch.device("meta"):
        assert checkpoints._config_name(VisionTransformer(CONFIGS["ViT-S_32"])) == "ViT-S_32"
        assert checkpoints._config_name(VisionTransformer(CONFIGS["R50-ViT-B_16"])) == "R50-ViT-B_16"


def test_save_is_atomic_and_keeps_the_usual_permissions(tmp_path, monkeypatch):
    import safetensors.torch

    path = save(build(seed=1), tmp_path / "model.safetensors")
    before = path.read_bytes()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    def full_disk(tensors, name, metadata):
        Path(name).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match=r"save: can't write .*model\.safetensors: No space left on device"):
        save(build(seed=2), path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plain"]


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="save: the file name must end in .safetensors, got .*model.pt"):
        save(build(), tmp_path / "model.pt")
    with pytest.raises(OSError, match="save: can't write .*nowhere.*: No such file or directory"):
        save(build(), tmp_path / "nowhere" / "model.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match="save: can't write .*folder.safetensors: Is a directory"):
        save(build(), tmp_path / "folder.safetensors")
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_without_safetensors(tmp_path, monkeypatch):
    path = save(build(), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: save(build(), path), lambda: load(build(), path), lambda: checkpoints.read_state_dict(path)):
        with pytest.raises(ImportError, match="pip install safetensors"):
            use()
