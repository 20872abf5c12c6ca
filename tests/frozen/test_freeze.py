"""What a user of `freeze` sees: a snapshot, its refusals, its files, its threads."""

import copy
import gc
import json
import threading

import pytest
import torch
from frozen_support import model
from torch import nn

import vit_fast
from vit_fast import Frozen, freeze
from vit_fast.frozen import Unsupported, products
from vit_fast.frozen import model as frozen_model
from vit_fast.testing import randn

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IMAGES = (2, 3, 64, 96)


@pytest.fixture(scope="module")
def source():
    return model(vis=True)


def logits_of(result):
    return result[0] if isinstance(result, tuple) else result


# ---- The same outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("options", ({}, {"vis": True}, {"classifier": "gap"}), ids=str)
def test_it_returns_what_its_source_returns(options, dtype):
    frozen = freeze(model(**options), dtype=dtype)  # which compares them itself
    assert all(e.ok for e in frozen.report().parity.values())
    logits, attention = frozen(randn(*IMAGES))
    assert logits.dtype == dtype and logits.shape == (2, 10)
    assert [tuple(a.shape) for a in attention] == [(2, 3, 25, 25)] * (2 if options.get("vis") else 0)


@pytest.mark.parametrize("impl", ("original", "google"))
def test_the_hybrid(impl):
    hybrid = model("R50-ViT-B_16", (64, 96), layers=1, hybrid_impl=impl)
    frozen = freeze(hybrid)
    assert frozen.architecture.grid == hybrid.transformer.embeddings.grid
    with pytest.raises(Unsupported, match="pads the normalised images"):
        freeze(hybrid, images="uint8", mean=0.5, std=0.5)


def test_a_transformer_without_head(source):
    frozen = freeze(source.transformer)
    tokens, attention = frozen(randn(*IMAGES))
    assert tokens.shape == (2, 25, 192) and len(attention) == 2
    with pytest.raises(TypeError, match="takes no labels"):
        frozen(randn(*IMAGES), torch.zeros(2, dtype=torch.long))


def test_labels_give_the_loss(source):
    images, labels = randn(*IMAGES), torch.tensor([3, 7])
    with torch.no_grad():
        torch.testing.assert_close(freeze(source)(images, labels), source(images, labels))


def test_named_outputs(source):
    frozen = freeze(source)
    found = frozen(randn(*IMAGES), outputs=("pooled", "layer:-1", "attention_mean"))
    assert list(found) == ["pooled", "layer:-1", "attention_mean"]
    assert found["layer:-1"].shape == (2, 25, 192) and len(found["attention_mean"]) == 2
    by_default = freeze(source, outputs="tokens", check=False)
    assert list(by_default(randn(*IMAGES))) == ["tokens"]
    with pytest.raises(ValueError, match="there is no output 'logit'"):
        freeze(source, outputs="logit", check=False)


@pytest.mark.parametrize("layout", ("BCHW", "BHWC"))
def test_bytes(source, layout):
    frozen = freeze(source, images="uint8", mean=MEAN, std=STD)
    images = torch.randint(256, IMAGES, dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        expected = source((images / 255 - mean) / std)[0]
    given = images if layout == "BCHW" else images.permute(0, 2, 3, 1).contiguous()
    torch.testing.assert_close(frozen(given)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="frozen for uint8 images, got float32"):
        frozen(randn(*IMAGES))


def test_other_sizes():
    source = model(interpolate_positions=True)
    fixed = model()
    images = randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = source(images)[0]
    torch.testing.assert_close(freeze(source)(images)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(freeze(fixed, interpolate_positions=True)(images)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="images are 48x80, the model is for 64x96"):
        freeze(fixed)(images)
    with pytest.raises(ValueError, match="smaller than one patch"):
        freeze(source)(randn(1, 3, 8, 80))


def test_autocast_and_grad_mode_change_nothing(source):
    frozen, images = freeze(source), randn(*IMAGES)
    expected = frozen(images)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(images)[0], expected)
    with torch.inference_mode():
        assert torch.equal(frozen(images)[0], expected)
    head = nn.Linear(192, 2)
    head(frozen(images, outputs="pooled")["pooled"]).sum().backward()  # not an inference tensor: a head can be trained on it
    assert head.weight.grad is not None


# ---- A snapshot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_it_is_a_snapshot_and_refreshes(dtype):
    source, other = model(), model(seed=1)
    frozen, images = freeze(source, dtype=dtype, interpolate_positions=True), randn(*IMAGES)
    larger = randn(1, 3, 96, 96)
    before = frozen(images)[0].clone(), frozen(larger)[0].clone()
    source.load_state_dict(other.state_dict())
    assert torch.equal(frozen(images)[0], before[0])
    frozen.refresh()
    fresh = freeze(other, dtype=dtype, interpolate_positions=True)
    assert torch.equal(frozen(images)[0], fresh(images)[0])
    assert torch.equal(frozen(larger)[0], fresh(larger)[0])
    assert not frozen.report().parity  # what was measured is of other weights


def test_refresh_wants_the_same_architecture_and_a_source():
    source = model()
    frozen = freeze(source)
    with pytest.raises(ValueError, match="another architecture"):
        frozen.refresh(model(classes=3))
    del source
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        frozen.refresh()


def test_the_source_is_left_as_it_is():
    source = model()
    before = {name: (t.data_ptr(), t.clone()) for name, t in source.state_dict().items()}
    freeze(source)(randn(*IMAGES))
    for name, tensor in source.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])


def test_the_source_can_go():
    import weakref

    source = model()
    frozen, alive = freeze(source), weakref.ref(source)
    del source
    gc.collect()
    assert alive() is None
    frozen(randn(*IMAGES))


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_it_refuses_training_and_hooks():
    source = model()
    source.transformer.encoder.layer[1].ffn.train()
    with pytest.raises(Unsupported, match=r"VisionTransformer\.transformer\.encoder\.layer\.1\.ffn is in training mode"):
        freeze(source)
    source.eval()
    handle = source.transformer.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match=r"layer\.0 has hooks"):
        freeze(source)
    handle.remove()
    frozen = freeze(source)
    with pytest.raises(RuntimeError, match="can't be trained"):
        frozen.train()
    assert frozen.eval() is frozen and frozen.train(False) is frozen


def test_it_refuses_what_it_cannot_read():
    with pytest.raises(Unsupported, match="torch.nn.modules.linear.Linear is not a model that it can read"):
        freeze(nn.Linear(3, 3).eval())
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        freeze("ViT-B_16")
    source = model()
    source.transformer.encoder.layer[1].ffn.act_fn = torch.relu
    with pytest.raises(Unsupported, match="block 1's activation"):
        freeze(source)
    with torch.device("meta"):
        absent = vit_fast.VisionTransformer(vit_fast.CONFIGS["testing"], 32, 3).eval()
    with pytest.raises(Unsupported, match="meta device"):
        freeze(absent)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(dtype=torch.float64), TypeError, "dtype must be one of float32, bfloat16, float16"),
        (dict(images="bytes"), ValueError, "images must be 'float' or 'uint8', got 'bytes'"),
        (dict(images="uint8"), ValueError, "needs mean and std"),
        (dict(mean=0.5, std=0.5), ValueError, "are for images='uint8'"),
        (dict(images="uint8", mean=(0.5, 0.5), std=0.5), ValueError, "one for each of 3 channels"),
        (dict(images="uint8", mean=0.5, std=(1, 0, 1)), ValueError, "std must be above 0"),
        (dict(images="uint8", mean=float("nan"), std=1), ValueError, "mean must be one number"),
    ),
)
def test_options_that_do_not_fit(source, options, error, message):
    with pytest.raises(error, match=message):
        freeze(source, **options)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    (
        (torch.zeros(3, 64, 96), ValueError, r"images must be \[B, C, H, W\]"),
        (torch.zeros(1, 4, 64, 96), ValueError, "must have 3 channels"),
        (torch.zeros(1, 3, 64, 96, dtype=torch.uint8), TypeError, "freeze.model, images='uint8'"),
        ([1], TypeError, "images must be a tensor, got list"),
        (torch.zeros(1, 3, 64, 96, device="meta"), ValueError, "images must be on cpu, got meta"),
        (torch.zeros(1, 3, 64, 96, requires_grad=True), RuntimeError, "it computes no gradients"),
    ),
    ids=lambda value: None if isinstance(value, (torch.Tensor, type)) else str(value)[:20],
)
def test_images_that_do_not_fit(source, images, error, message):
    with pytest.raises(error, match=message):
        freeze(source, check=False)(images)


# ---- The check ------------------------------------------------------------------------------------------------------


def test_the_check_finds_a_wrong_weight(source, monkeypatch):
    folded_for = frozen_model.folded_for

    def wrong(*arguments):
        folded = folded_for(*arguments)
        folded.weights["blocks.1.out.bias"][5] += 1e-3
        return folded

    monkeypatch.setattr(frozen_model, "folded_for", wrong)
    with pytest.raises(RuntimeError, match="beyond the error budget .0: error"):
        freeze(source)
    frozen = freeze(source, check=False)
    assert "not checked" in str(frozen.report())


def test_the_report(source):
    report = freeze(source, images="uint8", mean=MEAN, std=STD).report()
    text = str(report)
    for expected in ("vit_fast VisionTransformer: 2 blocks of width 192", "normalisation", "LayerNorm's weight", "budget"):
        assert expected in text
    assert report.memory > sum(p.numel() for p in source.transformer.encoder.parameters()) * 4
    assert set(report.implementations) == {"patch_embed", "layer_norm", "attention", "linear"}


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("packed", "onednn", "dense"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_saved_and_loaded_it_is_the_same(tmp_path, source, dtype, kind, monkeypatch):
    from vit_fast import extension

    if kind == "packed" and extension.missing("cpu"):
        pytest.skip(extension.missing("cpu"))
    kinds = {"packed": products.Packed, "onednn": products.OneDnn, "dense": products.Dense}
    path = tmp_path / "frozen.safetensors"
    images = torch.randint(256, IMAGES, dtype=torch.uint8)
    frozen = freeze(source, dtype=dtype, images="uint8", mean=MEAN, std=STD, check=False)
    frozen.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = Frozen.load(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded(images)[1], frozen(images)[1], strict=True))
    assert torch.equal(loaded(images)[0], frozen(images)[0])
    assert loaded.report().folded == frozen.report().folded
    # Whatever computes where it is loaded.
    monkeypatch.setattr(products, "best_for", lambda device, dtype: kinds[kind])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(Frozen.load(path)(images)[0], frozen(images)[0], rtol=tolerance, atol=tolerance)


def test_a_saved_hybrid_needs_no_source(tmp_path):
    frozen, images = freeze(model("R50-ViT-B_16", (64, 64), layers=1)), randn(1, 3, 64, 64)
    frozen.save(tmp_path / "hybrid.safetensors")
    assert torch.equal(Frozen.load(tmp_path / "hybrid.safetensors")(images)[0], frozen(images)[0])


def test_loading_with_other_options(tmp_path, source):
    freeze(source, check=False).save(tmp_path / "a.safetensors")
    loaded = Frozen.load(tmp_path / "a.safetensors", outputs=("tokens",), interpolate_positions=True)
    assert loaded(randn(1, 3, 32, 32))["tokens"].shape == (1, 5, 192)
    with pytest.raises(TypeError, match="can't change dtype"):
        Frozen.load(tmp_path / "a.safetensors", dtype=torch.bfloat16)


def test_files_that_are_none(tmp_path, source):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a file of this kind")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        Frozen.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no frozen model"):
        Frozen.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"vit_fast.frozen": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match="is of format 99, this version reads format 1"):
        Frozen.load(path)
    with pytest.raises(FileNotFoundError):
        Frozen.load(tmp_path / "absent.safetensors")


def test_saving_that_fails_leaves_what_was_there(tmp_path, source, monkeypatch):
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    frozen = freeze(source, check=False)
    frozen.save(path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        frozen.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- Threads, compilers ---------------------------------------------------------------------------------------------


def test_threads_do_not_mix_their_images(source):
    frozen = freeze(source, check=False, interpolate_positions=True)
    inputs = [randn(1 + i % 3, 3, 64, 96 if i % 2 else 64, seed=i) for i in range(6)]
    expected = [frozen(x)[0] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(frozen(inputs[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torch_compile_goes_around_it(source):
    frozen, images = freeze(source, check=False), randn(*IMAGES)
    compiled = torch.compile(lambda x: frozen(x * 2)[0] + 1, backend="eager")
    assert torch.equal(compiled(images), frozen(images * 2)[0] + 1)
    torch._dynamo.reset()  # or the pieces of before would run
    with pytest.raises(Exception, match="one opaque call"):
        torch.compile(frozen.__call__, backend="eager", fullgraph=True)(images)


def test_copies_and_warmup(source):
    frozen = freeze(source, check=False)
    frozen.warmup((1, 4))
    images = randn(*IMAGES)
    assert torch.equal(copy.copy(frozen)(images)[0], frozen(images)[0])
    with pytest.raises(RuntimeError, match="there are no CUDA graphs here"):
        frozen.input_buffer(2)
