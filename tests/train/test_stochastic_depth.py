"""Stochastic depth and gradient checkpointing in the modules: by the formula when on, and not there when off."""

import copy

import pytest
import torch

from vit_fast import CONFIGS, VisionTransformer, backends, ops


def model(rate=None, layers=3):
    config = copy.deepcopy(CONFIGS["ViT-Ti_16"])
    config.transformer.num_layers, config.transformer.dropout_rate = layers, 0.0
    if rate is not None:
        config.transformer.stochastic_depth_rate = rate
    torch.manual_seed(0)
    return VisionTransformer(config, img_size=32, num_classes=3)


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_off_it_is_not_there():
    plain, off = model(), model(0.0)
    assert plain.state_dict().keys() == off.state_dict().keys() == model(0.5).state_dict().keys()
    torch.manual_seed(3)
    expected = plain.train()(images())[0]
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(off.train()(images())[0], expected) and torch.equal(torch.rand(1), following)  # nothing was drawn
    assert torch.equal(model(0.5).eval()(images())[0], plain.eval()(images())[0])


def test_rates_grow_with_depth():
    assert [block.stochastic_depth_rate for block in model(0.4).transformer.encoder.layer] == [0.0, 0.2, 0.4]
    assert [block.stochastic_depth_rate for block in model(0.4, layers=1).transformer.encoder.layer] == [0.0]


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match=r"stochastic_depth_rate must be in \[0, 1\]"):
        model(rate)


@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_by_the_formula(implementation):
    """Each image's stream is x plus its halves, each left out or scaled; which is told by computing all four."""
    block = model(0.5).transformer.encoder.layer[2].train()
    assert block.stochastic_depth_rate == 0.5
    x = torch.randn(64, 5, 192, generator=torch.Generator().manual_seed(2))
    with backends.use(implementation), torch.no_grad():
        torch.manual_seed(4)
        result = block(x)[0]
        attended = 2 * block.attn(block.attention_norm(x))[0]
        outcomes = []
        for with_attention in (0, 1):
            h = x + with_attention * attended
            outcomes += [h, h + 2 * block.ffn(block.ffn_norm(h))]
    distances = torch.stack([(result - outcome).abs().amax((1, 2)) for outcome in outcomes])
    nearest, which = distances.min(0)
    assert nearest.max() < 1e-4 and distances.sort(0).values[1].min() > 1e-2
    counts = which.bincount(minlength=4)
    assert counts.sum() == 64 and counts.min() >= 6  # 16 on average, deviation 3.5


def test_inside_the_fused_operations(monkeypatch):
    """They are handed every rate, and nothing is dropped, scaled or added beside them."""
    called = []
    for name in ("attention", "linear", "mlp", "layer_norm"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _real=real, _name=name, **k: called.append((_name, a)) or _real(*a, **k))
    m = model(0.5).train()
    for block in m.transformer.encoder.layer:
        block.attn.attn_dropout.p, block.attn.proj_dropout.p, block.ffn.dropout.p = 0.1, 0.2, 0.3
    m(images())
    rates = [(0.2, p) for p in (0.0, 0.25, 0.5)]
    assert [a[-2:] for name, a in called if name == "linear" and len(a) > 3] == rates
    assert [a[-2:] for name, a in called if name == "mlp"] == [(0.3, p) for _, p in rates]
    assert [a[2] for name, a in called if name == "attention"] == 3 * [0.1]
    assert sum(name == "layer_norm" for name, _ in called) == 7


@pytest.mark.parametrize("where", ["attn", "ffn", "attn.out", "ffn.fc2"])
def test_with_a_hook_too(where):
    """Where somebody watches, the halves are left out all the same."""
    m = model(1.0).train()
    block = m.transformer.encoder.layer[2]
    seen = []
    block.get_submodule(where).register_forward_hook(lambda *args: seen.append(args[2]))
    hidden = torch.randn(2, 5, 192)
    assert torch.equal(block(hidden)[0], hidden) and len(seen) == 1


def test_rate_one_leaves_the_last_block_out():
    m = model(1.0).train()
    hidden = torch.randn(2, 5, 192)
    assert torch.equal(m.transformer.encoder.layer[2](hidden)[0], hidden)


def test_checkpointed_gradients():
    """The same, dropout and stochastic depth included; and less is kept."""
    gradients, kept = [], []
    for checkpointing in (False, True):
        m = model(0.3).train()
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        m.transformer.encoder.gradient_checkpointing = checkpointing
        sizes = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = m(images(), torch.tensor([0, 1, 2, 0]))
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0] / 2
