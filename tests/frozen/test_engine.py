"""The engine on every kind of architecture: exact in float64, within the budget in each dtype, whatever computes its steps."""

import dataclasses

import pytest
import torch
from frozen_support import KINDS, description

from vit_fast import extension
from vit_fast.frozen import products
from vit_fast.frozen.description import Architecture, Outputs, forward_reference
from vit_fast.frozen.engine import CACHED_GRIDS, Engine, InPlace
from vit_fast.frozen.fold import Normalisation, fold
from vit_fast.testing import assert_within_budget, randn

COMPUTED_BY = {"packed": products.Packed, "onednn": products.OneDnn, "dense": products.Dense}
NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.fixture(params=COMPUTED_BY)
def kind(request, monkeypatch):
    """Each kind of product in turn, and the computer that goes with it."""
    if request.param == "packed" and extension.missing("cpu"):
        pytest.skip(extension.missing("cpu"))
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "best_for", lambda device, dtype: COMPUTED_BY[request.param])
    return request.param


def engine_for(described, dtype, normalisation=None):
    from vit_fast.frozen.engine import computer_for

    device = torch.device("cpu")
    unit = computer_for(device, dtype).unit
    return Engine(fold(described, dtype, normalisation, unit), described.stem, device, dtype)


def names_for(architecture, tokens=True):
    names = ["pooled", "logits"] if architecture.pool else []
    if tokens:
        names += ["tokens", "embeddings", "layer", "layer:-1", "attention", "attention_class_token:0", "attention_mean:-1"]
    return Outputs.parse(names, architecture)


def flat(results):
    return [t for value in results.values() for t in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("tokens", (True, False), ids=("everything", "head alone"))
@pytest.mark.parametrize("name", KINDS)
def test_folding_is_exact(name, tokens, monkeypatch):
    monkeypatch.setattr(products, "best_for", lambda device, dtype: products.Dense)
    described = description(name)
    outputs = names_for(described.architecture, tokens)
    images = randn(2, 3, 32, 48, dtype=torch.float64)
    actual = flat(engine_for(described, torch.float64).run(images, outputs, class_token_only=True))
    expected = flat(forward_reference(described, images, outputs))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_within_the_budget(name, dtype, kind):
    if kind == "packed" and dtype not in extension.DTYPES["cpu"] or kind == "onednn" and dtype == torch.float16:
        pytest.skip(f"{kind} products don't compute in {dtype}")
    described = description(name, dtype=torch.float32).to(dtype)
    engine = engine_for(described, dtype)
    images = randn(5, 3, 32, 48, dtype=dtype)
    for tokens in (True, False):
        outputs = names_for(described.architecture, tokens)
        actual = flat(engine.run(images, outputs, class_token_only=True))
        reference = flat(forward_reference(described, images, outputs))
        exact = flat(forward_reference(described.to(torch.float64), images.double(), outputs))
        assert_within_budget(actual, reference, exact, f"{name}, tokens {tokens}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("BCHW", "BHWC"))
def test_bytes_are_normalised_inside(layout, dtype, kind):
    described = description("plain", dtype=torch.float32).to(dtype)
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in NORMALISATION.values)
    normalised = (images.double() / 255 - mean) / std
    outputs = names_for(described.architecture)
    given = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if layout == "BHWC" else images
    actual = flat(engine_for(described, dtype, NORMALISATION).run(given, outputs, class_token_only=True))
    reference = flat(forward_reference(described, normalised.to(dtype), outputs))
    exact = flat(forward_reference(described.to(torch.float64), normalised, outputs))
    assert_within_budget(actual, reference, exact)


def test_results_stay_when_the_buffers_are_used_again(kind):
    described = description("DINOv2 with registers", dtype=torch.float32)
    engine = engine_for(described, torch.float32)
    outputs = names_for(described.architecture)
    first, second = randn(2, 3, 32, 48), randn(3, 3, 32, 48, seed=1)
    results = flat(engine.run(first, outputs, class_token_only=True))
    copies = [t.clone() for t in results]
    engine.run(second, outputs, class_token_only=True)
    assert all(torch.equal(t, c) for t, c in zip(results, copies, strict=True))
    addresses = [t.untyped_storage().data_ptr() for t in results]
    assert len(set(addresses)) >= len(addresses) - 3  # `layer:-1` and the halves of `pooled` may share memory with others


def test_the_head_alone_computes_the_last_block_for_what_it_reads(kind, monkeypatch):
    described = description("plain", dtype=torch.float32)
    engine = engine_for(described, torch.float32)
    rows = []
    product = engine.products["blocks.1.fc1"]
    monkeypatch.setitem(engine.products, "blocks.1.fc1", lambda x, **how: rows.append(x.shape[1]) or product(x, **how))
    images = randn(2, 3, 32, 48)
    pruned = engine.run(images, names_for(described.architecture, tokens=False), class_token_only=True)
    whole = engine.run(images, names_for(described.architecture, tokens=False), class_token_only=False)
    engine.run(images, names_for(described.architecture), class_token_only=True)
    assert rows == [1, 7, 7]
    torch.testing.assert_close(pruned["logits"], whole["logits"])


def test_other_sizes_and_their_cached_tables(kind):
    described = description("DINOv2 with registers", dtype=torch.float32)
    engine = engine_for(described, torch.float32)
    outputs = names_for(described.architecture)
    for rows in range(2, CACHED_GRIDS + 4):
        images = randn(4, 3, 16 * rows, 32)
        actual = flat(engine.run(images, outputs, class_token_only=True))
        reference = flat(forward_reference(described, images, outputs))
        exact = flat(forward_reference(described.to(torch.float64), images.double(), outputs))
        assert_within_budget(actual, reference, exact)
    assert len(engine.tables) <= CACHED_GRIDS


def test_an_empty_batch(kind):
    described = description("plain", dtype=torch.float32)
    for tokens in (True, False):
        results = engine_for(described, torch.float32).run(
            torch.empty(0, 3, 32, 48), names_for(described.architecture, tokens), class_token_only=True
        )
        assert all(t.shape[0] == 0 for t in flat(results))


def test_updating_in_place(kind):
    old, new = description("plain", dtype=torch.float32), description("plain", dtype=torch.float32, seed=1)
    images, other = randn(2, 3, 32, 48), randn(2, 3, 48, 16)
    engine, fresh = engine_for(old, torch.float32), engine_for(new, torch.float32)
    outputs = names_for(old.architecture)
    engine.run(other, outputs, class_token_only=True)  # its table is updated too
    engine.update(fold(new, torch.float32, None, engine.computer.unit), None)
    for batch in (images, other):
        for tokens in (True, False):
            outputs = names_for(old.architecture, tokens)
            actual, expected = (flat(e.run(batch, outputs, class_token_only=True)) for e in (engine, fresh))
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_weights_come_back_dense(kind):
    described = description("SigLIP", dtype=torch.float32)
    folded = fold(described, torch.float32)
    expected = dict(folded.weights)
    found = Engine(folded, None, torch.device("cpu"), torch.float32).weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_in_place_is_what_packed_products_compute_with(monkeypatch):
    if extension.missing("cpu"):
        pytest.skip(extension.missing("cpu"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(engine_for(description("plain"), torch.float32).computer, InPlace)


def test_an_architecture_survives_json():
    import json

    for name in KINDS:
        architecture = description(name).architecture
        assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture
    with pytest.raises(ValueError, match="activation must be one of"):
        dataclasses.replace(architecture, activation="relu")


@pytest.mark.parametrize(
    ("names", "message"),
    (
        (["logit"], "there is no output 'logit'; there are logits, pooled"),
        (["tokens:1"], "there is no output 'tokens:1'"),
        (["layer:2"], "there are layers 0 to 1"),
        (["layer:-3"], "there are layers 0 to 1"),
        ([3], "there is no output 3"),
    ),
)
def test_outputs_that_do_not_exist(names, message):
    with pytest.raises(ValueError, match=message):
        Outputs.parse(names, description("plain").architecture)


def test_outputs_that_an_architecture_lacks():
    with pytest.raises(ValueError, match="pools nothing, so it has no logits"):
        Outputs.parse("logits", description("features").architecture)
