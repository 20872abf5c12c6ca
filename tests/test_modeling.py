"""The drop-in model against the original's formulas (tests/oracle.py), and everything that users do to a module."""

import copy
import pickle
from collections import OrderedDict

import oracle
import pytest
import torch
from torch import nn

import vit_fast
from vit_fast import CONFIGS, VisionTransformer
from vit_fast.testing import assert_within_budget, randn

CLASSES = 10


def small(name="ViT-Ti_16", layers=2, **changes):
    config = copy.deepcopy(CONFIGS[name])
    config.transformer.num_layers = layers
    for key, value in changes.items():
        config.transformer[key] = value
    return config


def build(config=None, img_size=64, seed=0, device="cpu", **options):
    """A model whose every parameter is random, the zero-initialised ones too."""
    torch.manual_seed(seed)
    model = VisionTransformer(config or small(), img_size=img_size, num_classes=CLASSES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval().to(device)


def images(batch=2, size=64, **options):
    return randn(batch, 3, size, size, **options)


def labels_for(batch, device="cpu"):
    return (torch.arange(batch) % CLASSES).to(device)


def assert_gradients_within_budget(model, reference, exact, what):
    """Query's, key's and value's are judged together, as the packed product computes them: adding a constant to every key
    changes no softmax, so the key bias's exact gradient is zero, and all that is there is rounding."""

    def packed(gradients, name):
        return torch.cat([gradients[name.replace("query", part)] for part in ("query", "key", "value")])

    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in actual:
        if "attn.query" in name:
            assert_within_budget(
                *(packed(g, name) for g in (actual, reference, exact)), f"{what} gradient of {name} and its packed ones"
            )
        elif "attn.key" not in name and "attn.value" not in name:
            assert_within_budget(actual[name], reference[name], exact[name], f"{what} gradient of {name}")


# The head sizes and patch sizes of every config; the deep ones with fewer layers, and small images, so that float64 is quick.
CASES = {
    "ViT-Ti_16": (12, 64),
    "ViT-S_16": (2, 64),
    "ViT-S_32": (2, 64),
    "ViT-B_16": (2, 96),
    "ViT-B_32": (2, 96),
    "ViT-L_16": (2, 48),
    "ViT-L_32": (1, 64),
    "ViT-H_14": (1, 42),
    "ViT-g_14": (1, 42),
    "R50-ViT-B_16": (1, 64),
    "testing": (1, 32),
}


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_the_original(name, vis, device):
    """Logits, loss, attention weights and every parameter's gradient; by the reference path and by the fast one."""
    layers, size = CASES[name]
    config = small(name, layers)
    units = None
    if "R50" in name:
        config.resnet.num_layers = units = (1, 2, 1)
    model = build(config, size, vis=vis, device=device)
    x, labels = images(2, size, device=device), labels_for(2, device)
    heads = config.transformer.num_heads
    exact = oracle.evaluate(model.state_dict(), x, labels, heads, torch.float64, units)
    reference = oracle.evaluate(model.state_dict(), x, labels, heads, torch.float32, units)
    for implementation in ("reference", "auto"):
        with vit_fast.use(implementation):
            logits, attention = model(x)
            loss = model(x, labels)
        assert_within_budget(logits, reference["logits"], exact["logits"], f"{implementation} logits")
        # The loss is a difference of numbers the size of the logits, and inherits their errors: judged as one of them.
        results = [torch.cat([r["logits"].flatten(), r["loss"][None]]) for r in (reference, exact)]
        assert_within_budget(torch.cat([logits.flatten(), loss[None]]), *results, f"{implementation} loss")
        if vis:
            assert_within_budget(attention, reference["attention"], exact["attention"], f"{implementation} attention")
        else:
            assert attention == []
        model.zero_grad()
        loss.backward()
        assert_gradients_within_budget(model, reference["gradients"], exact["gradients"], implementation)


def test_full_size_vit_b_16():
    """The published size, untouched: 224 pixels, 12 layers, 197 tokens."""
    model = build(CONFIGS["ViT-B_16"], 224, vis=True)
    x = images(1, 224)
    with torch.no_grad():
        exact, exact_attention, _ = oracle.vision_transformer(model.double().state_dict(), x.double(), 12)
        reference, reference_attention, _ = oracle.vision_transformer(model.float().state_dict(), x, 12)
        logits, attention = model(x)
    assert_within_budget(logits, reference, exact, "logits")
    assert_within_budget(attention, reference_attention, exact_attention, "attention")


def narrow():
    """Two heads of 24 channels: small enough for Triton's interpreter."""
    config = small(num_heads=2, mlp_dim=96)
    config.hidden_size = 48
    return config


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_on_the_triton_kernels(dtype, vis, device):
    """Every operation of the model by its Triton kernels, forward and backward, as `auto` runs it on a GPU."""
    model = build(narrow(), 32, vis=vis, device=device).to(dtype)
    x, labels = images(2, 32, device=device).to(dtype), labels_for(2, device)
    exact = oracle.evaluate(model.state_dict(), x, labels, 2, torch.float64)
    reference = oracle.evaluate(model.state_dict(), x, labels, 2, dtype)
    with vit_fast.use("triton"):
        logits, attention = model(x)
        model(x, labels).backward()
    assert_within_budget(logits, reference["logits"], exact["logits"], "logits")
    assert_within_budget(attention, reference["attention"][: len(attention)], exact["attention"][: len(attention)], "attention")
    assert_gradients_within_budget(model, reference["gradients"], exact["gradients"], "triton")


def test_training_with_dropout_on_the_triton_kernels(device):
    """The same seed draws the same masks again, another seed others; gradients are finite and no parameter is left out."""
    config = narrow()
    config.transformer.attention_dropout_rate = 0.2
    model = build(config, 32, device=device).train()
    x, labels = images(2, 32, device=device), labels_for(2, device)
    losses = []
    with vit_fast.use("triton"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(x, labels))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    losses[0].backward()
    assert all(bool(p.grad.isfinite().all()) and float(p.grad.abs().max()) > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    model = build(device=device).to(dtype)
    x, labels = images(device=device), labels_for(2, device)
    exact = oracle.evaluate(model.state_dict(), x.to(dtype), labels, 3, torch.float64)
    reference = oracle.evaluate(model.state_dict(), x.to(dtype), labels, 3, dtype)
    logits, _ = model(x.to(dtype))
    assert logits.dtype == dtype
    assert_within_budget(logits, reference["logits"], exact["logits"], "logits")
    model(x.to(dtype), labels).backward()
    assert_gradients_within_budget(model, reference["gradients"], exact["gradients"], "auto")


@pytest.mark.parametrize("vis", [False, True])
def test_autocast(vis, device):
    model = build(vis=vis, device=device)
    x = images(device=device)
    exact = oracle.vision_transformer(model.double().state_dict(), x.double(), 3)
    model.float()
    with torch.autocast(device.type, torch.bfloat16):
        with vit_fast.use("reference"):
            reference, reference_attention = model(x)
        logits, attention = model(x)
    assert logits.dtype == reference.dtype == torch.bfloat16
    assert_within_budget(logits, reference, exact[0], "logits")
    assert [t.dtype for t in attention] == [t.dtype for t in reference_attention]
    assert_within_budget(attention, reference_attention, exact[1][: len(attention)], "attention", dtype=torch.bfloat16)


# ---- Training mode and dropout --------------------------------------------------------------------------------------


def test_dropout_draws_the_same_masks_as_the_original():
    """The stock operations, with the published rates (no attention dropout). The fused ones draw masks of their own."""
    model = build().train()
    x = images()
    outputs = []
    for implementation in ("reference", "torch"):
        torch.manual_seed(3)
        with vit_fast.use(implementation):
            outputs.append(model(x)[0])
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[1], model(x)[0])  # another draw


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_attention_dropout_statistics(implementation):
    """Kept with probability 1-p and scaled by 1/(1-p): expectation and variance are as that predicts."""
    attention = vit_fast.Attention(small(attention_dropout_rate=0.25), vis=False).train()
    attention.proj_dropout.p = 0.0
    nn.init.eye_(attention.out.weight)
    x = images(1, 8)[:, :, :, :].reshape(1, 1, 192).expand(1, 16, 192)  # equal tokens: every probability is 1/16
    torch.manual_seed(0)
    with vit_fast.use(implementation), torch.no_grad():
        draws = torch.stack([attention(x)[0] for _ in range(400)])
        exact = attention.eval()(x)[0]
    value = exact - attention.out.bias
    # Each output is value · mean of 16 draws of Bernoulli(0.75)/0.75, whose variance is 0.25/0.75/16.
    relative = (draws - attention.out.bias) / value
    per_head = relative.unflatten(-1, (3, 64))[..., 0]  # the 64 channels of a head share their masks
    assert abs(float(per_head.mean()) - 1) < 0.01
    assert abs(float(per_head.var()) - 0.25 / 0.75 / 16) < 0.003


def test_dropout_modules_obey_their_own_mode():
    """Monte-Carlo dropout: the model in eval, its dropout modules in train."""
    model = build(small(attention_dropout_rate=0.5))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    x = images()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_a_model_learns():
    """A few steps on random labels reduce the loss to nearly nothing, by the reference and by the fast path alike."""
    losses = {}
    for implementation in ("reference", "auto"):
        with vit_fast.use(implementation):
            model = build(small(dropout_rate=0.0)).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            history = []
            for _ in range(12):
                loss = model(images(8), labels_for(8))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(float(loss.detach()))
        losses[implementation] = history
    assert losses["auto"][-1] < 0.1 * losses["auto"][0]
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-2, abs=1e-3)


# ---- Names, configs, initialisation ---------------------------------------------------------------------------------


def documented_keys(layers, hybrid_units=None):
    keys = ["transformer.embeddings.cls_token", "transformer.embeddings.position_embeddings"]
    modules = ["transformer.embeddings.patch_embeddings", "transformer.encoder.encoder_norm", "head"]
    for i in range(layers):
        for part in ("attention_norm", "ffn_norm", "attn.query", "attn.key", "attn.value", "attn.out", "ffn.fc1", "ffn.fc2"):
            modules.append(f"transformer.encoder.layer.{i}.{part}")
    keys += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    if hybrid_units:
        root = "transformer.embeddings.hybrid_model"
        keys += [f"{root}.root.conv.weight", f"{root}.root.gn.weight", f"{root}.root.gn.bias"]
        for b, units in enumerate(hybrid_units, 1):
            for u in range(1, units + 1):
                unit = f"{root}.body.block{b}.unit{u}"
                convolutions, norms = ["conv1", "conv2", "conv3"], ["gn1", "gn2", "gn3"]
                if u == 1:
                    convolutions, norms = [*convolutions, "downsample"], [*norms, "gn_proj"]
                keys += [f"{unit}.{c}.weight" for c in convolutions]
                keys += [f"{unit}.{n}.{kind}" for n in norms for kind in ("weight", "bias")]
    return keys


@pytest.mark.parametrize("name", ["ViT-B_32", "R50-ViT-B_16"])
def test_state_dict_keys(name):
    units = (3, 4, 9) if "R50" in name else None
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[name])
    expected = documented_keys(12, units)
    assert sorted(model.state_dict()) == sorted(expected)
    foreign = OrderedDict((key, torch.empty_like(model.state_dict()[key])) for key in expected)
    assert str(model.load_state_dict(foreign, strict=True, assign=True)) == "<All keys matched successfully>"


def test_state_dicts_load_strictly_in_both_directions():
    source, target = build(seed=1), build(seed=2)
    target.load_state_dict(source.state_dict(), strict=True)
    x = images()
    assert torch.equal(source(x)[0], target(x)[0])
    source.load_state_dict(OrderedDict((k, v.clone()) for k, v in target.state_dict().items()), strict=True, assign=True)
    assert torch.equal(source(x)[0], target(x)[0])


def test_parameter_counts_of_the_published_sizes():
    """With 1,000 classes and 224 pixels: timm's model cards."""
    counts = {"ViT-Ti_16": 5.717, "ViT-S_16": 22.051, "ViT-B_16": 86.568, "ViT-L_16": 304.327, "ViT-H_14": 632.046}
    for name, millions in counts.items():
        with torch.device("meta"):
            model = VisionTransformer(CONFIGS[name], num_classes=1000)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3), name


def test_ml_collections_config():
    ml_collections = pytest.importorskip("ml_collections", reason="ml_collections is not installed (the dev extra has it)")
    config = ml_collections.ConfigDict(dict(small()))
    config.patches = ml_collections.ConfigDict({"size": (16, 16)})
    config.transformer = ml_collections.ConfigDict(dict(small().transformer))
    ours, theirs = build(small()), build(config)
    assert torch.equal(ours(images())[0], theirs(images())[0])


def test_config_behaves_as_the_original():
    config = CONFIGS["ViT-B_16"]
    assert config.patches.get("grid") is None and config.patches["size"] == (16, 16) == config.patches.size
    assert config.transformer["num_heads"] == config.transformer.num_heads == 12
    mine = copy.deepcopy(config)
    mine.transformer.num_layers = 6
    del mine.patches.size
    mine.patches.grid = (14, 14)
    assert config.transformer.num_layers == 12 and "size" in config.patches
    assert pickle.loads(pickle.dumps(mine)) == mine
    assert type(pickle.loads(pickle.dumps(mine)).patches) is type(config)
    with pytest.raises(AttributeError, match="no field 'num_layer'"):
        config.transformer.num_layer  # noqa: B018
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        del mine.nothing


def test_initialisation():
    torch.manual_seed(0)
    model = VisionTransformer(small("ViT-B_16", 1), num_classes=CLASSES)
    block = model.transformer.encoder.layer[0]
    bound = (6 / (768 + 3072)) ** 0.5
    assert 0.99 * bound < float(block.ffn.fc1.weight.detach().abs().max()) <= bound
    assert 0.8e-6 < float(block.ffn.fc1.bias.detach().std()) < 1.2e-6
    assert float(model.transformer.embeddings.cls_token.detach().abs().max()) == 0
    assert float(model.transformer.embeddings.position_embeddings.detach().abs().max()) == 0
    assert float(block.attn.query.weight.detach().abs().max()) <= 768**-0.5
    assert block.attention_norm.eps == block.ffn_norm.eps == model.transformer.encoder.encoder_norm.eps == 1e-6


def test_gap_reads_the_mean_of_the_patch_tokens():
    config = small()
    config.classifier = "gap"
    model, x = build(config), images()
    encoded, _ = model.transformer(x)
    assert torch.equal(model(x)[0], model.head(encoded[:, 1:].mean(1)))
    config.classifier = "pool"
    with pytest.raises(ValueError, match="'token' or 'gap', got 'pool'"):
        build(config)


# ---- Inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_empty_batch(implementation):
    model = build(vis=True)
    with vit_fast.use(implementation):
        logits, attention = model(images(0))
    assert logits.shape == (0, CLASSES) and attention[1].shape == (0, 3, 17, 17)


def test_layouts_of_images():
    model = build()
    x = images(4, 128)[:, :, ::2, ::2]
    expected = model(x.contiguous())[0]
    torch.testing.assert_close(model(x)[0], expected)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last))[0], expected)
    torch.testing.assert_close(model(x.contiguous().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))[0], expected)
    torch.testing.assert_close(model(x[:1])[0], expected[:1])


def test_nan_images_propagate_to_their_own_logits_only():
    model, x = build(), images(3)
    x[1, 2, 5, 7] = float("nan")
    logits = model(x)[0]
    assert bool(logits[1].isnan().all()) and bool(logits[[0, 2]].isfinite().all())


REFUSED = {
    "integers": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "must be floating point, got torch.uint8"),
    "channels": (lambda: torch.zeros(1, 4, 64, 64), ValueError, "must have 3 channels, got 4"),
    "rank": (lambda: torch.zeros(3, 64, 64), ValueError, r"must be \[B, C, H, W\], got \[3, 64, 64\]"),
    "size": (lambda: torch.zeros(1, 3, 64, 80), ValueError, "images are 64x80, the model was built for img_size 64x64"),
    "dtype": (lambda: torch.zeros(1, 3, 64, 64).double(), TypeError, "images must be float32 as weight is, got float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_images(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        build()(make())


def test_size_error_names_both_remedies():
    with pytest.raises(ValueError) as error:
        build()(images(1, 96))
    assert "img_size=(96, 96)" in str(error.value) and "interpolate_positions=True" in str(error.value)


def test_bad_construction():
    with pytest.raises(ValueError, match="192 is not a multiple of 5 heads"):
        build(small(num_heads=5))
    with pytest.raises(ValueError, match="img_size 8x8 is smaller than one patch of 16x16"):
        build(img_size=8)


def test_rectangular_images_and_grids():
    model = build(img_size=(32, 80))
    assert model.transformer.embeddings.grid == (2, 5)
    x = randn(2, 3, 32, 80)
    expected, *_ = oracle.vision_transformer(model.state_dict(), x, 3)
    torch.testing.assert_close(model(x)[0], expected)


def test_sizes_that_fill_no_whole_patch():
    model = build(img_size=70)
    x = images(1, 70)
    assert model.transformer.embeddings.grid == (4, 4)
    torch.testing.assert_close(model(x)[0], build(img_size=64)(x[:, :, :64, :64])[0])


def test_position_interpolation_at_run_time():
    model = build(interpolate_positions=True)
    x = randn(2, 3, 96, 48)
    from vit_fast.checkpoints import resize_position_embeddings

    other = build(img_size=(96, 48))
    state = model.state_dict()
    name = "transformer.embeddings.position_embeddings"
    state[name] = resize_position_embeddings(state[name], (4, 4), (6, 3))
    other.load_state_dict(state)
    torch.testing.assert_close(model(x)[0], other(x)[0])
    model(x, labels_for(2)).backward()
    assert float(model.transformer.embeddings.position_embeddings.grad.abs().max()) > 0


# ---- The hybrid -----------------------------------------------------------------------------------------------------


def hybrid(size, **options):
    config = small("R50-ViT-B_16", 1)
    config.resnet.num_layers = (1, 1, 1)
    return build(config, size, **options)


@pytest.mark.parametrize("size, grid, patch", [(224, (14, 14), (1, 1)), (384, (24, 24), (1, 1)), (448, (14, 14), (2, 2))])
def test_hybrid_grids_of_the_original(size, grid, patch):
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS["R50-ViT-B_16"], img_size=size)
    assert model.transformer.embeddings.grid == grid
    assert model.transformer.embeddings.patch_embeddings.kernel_size == patch


def test_hybrid_at_sizes_where_the_original_fails():
    model = hybrid(200)
    assert model.transformer.embeddings.grid == model.transformer.embeddings.hybrid_model.output_grid(200, 200) == (13, 13)
    assert model(images(1, 200))[0].shape == (1, CLASSES)


def test_hybrid_implementations_differ():
    x = images(1, 64)
    original, google = hybrid(64), hybrid(64, hybrid_impl="google")
    google.load_state_dict(original.state_dict(), strict=True)
    assert not torch.allclose(original(x)[0], google(x)[0], atol=1e-3)
