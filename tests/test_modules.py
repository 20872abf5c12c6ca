"""What users do to modules: replace, hook, freeze, tie, move, copy, compile, shard. Results and gradients stay right."""

import copy
import io
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_modeling import CLASSES, build, images, labels_for, small
from torch import nn

import vit_fast
from vit_fast import VisionTransformer

# ---- Packed projections stay right ----------------------------------------------------------------------------------


def packed(model):
    attention = model.transformer.encoder.layer[0].attn
    return attention._packed.matches(attention.query, attention.key, attention.value)


def assert_agrees_with_reference(model, dtype=torch.float32):
    x = images().to(dtype)
    with torch.no_grad():
        fast = model(x)[0]
        with vit_fast.use("reference"):
            expected = model(x)[0]
    torch.testing.assert_close(fast, expected)


CHANGES = {
    "in place": lambda m: m.transformer.encoder.layer[0].attn.key.weight.data.mul_(3),
    "copy_": lambda m: m.transformer.encoder.layer[0].attn.query.bias.copy_(torch.ones(192)),
    "set_ data": lambda m: setattr(m.transformer.encoder.layer[0].attn.value.weight, "data", torch.ones(192, 192)),
    "replaced": lambda m: setattr(m.transformer.encoder.layer[0].attn.key, "weight", nn.Parameter(torch.rand(192, 192))),
    "transposed": lambda m: setattr(
        m.transformer.encoder.layer[0].attn.key.weight, "data", m.transformer.encoder.layer[0].attn.key.weight.data.T
    ),
    "tied": lambda m: setattr(m.transformer.encoder.layer[1].attn, "key", m.transformer.encoder.layer[0].attn.key),
    "tied by copy": lambda m: m.transformer.encoder.layer[1].load_state_dict(m.transformer.encoder.layer[0].state_dict()),
    "assigned": lambda m: m.load_state_dict({k: v.clone() * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "no bias": lambda m: setattr(m.transformer.encoder.layer[0].attn.key, "bias", None),
    "double": lambda m: m.double().float(),
    "swapped layer": lambda m: setattr(m.transformer.encoder.layer[0].attn, "key", nn.Sequential(nn.Linear(192, 192))),
    "shared memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_projections_follow_every_change(change):
    model = build()
    assert packed(model)
    with torch.no_grad():
        before = model(images())[0]
        CHANGES[change](model)
        after = model(images())[0]
    assert_agrees_with_reference(model)
    if change not in ("double", "shared memory"):
        assert not torch.equal(before, after)


def test_packing_survives_what_gives_parameters_new_memory():
    model = build()
    assert packed(copy.deepcopy(model)) and packed(pickle.loads(pickle.dumps(model)))
    assert packed(model.half().float()) and packed(model.to(torch.bfloat16).float())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert packed(model)
    with torch.device("meta"):
        empty = VisionTransformer(small(), img_size=64, num_classes=CLASSES)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert packed(empty)
    assert torch.equal(empty.eval()(images())[0], model(images())[0])


def test_packing_moves_nothing_but_addresses():
    """Same Parameter objects, contiguous, storages of their own size: optimizers and checkpoints see ordinary parameters."""
    attention = vit_fast.Attention(small(), vis=False)
    before = list(attention.parameters())
    attention.double()
    for old, new in zip(before, attention.parameters(), strict=True):
        assert old is new and new.is_contiguous() and new.is_leaf
        assert new.untyped_storage().nbytes() == new.numel() * new.element_size() and new.storage_offset() == 0


def test_a_change_between_forward_and_backward_is_detected():
    model = build()
    loss = model(images(), labels_for(2))
    with torch.no_grad():
        model.transformer.encoder.layer[0].attn.value.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_projections_get_no_gradient():
    model = build()
    model.transformer.encoder.layer[0].attn.key.weight.requires_grad_(False)
    model(images(), labels_for(2)).backward()
    attention = model.transformer.encoder.layer[0].attn
    assert attention.key.weight.grad is None and attention.key.bias.grad is not None and attention.query.weight.grad is not None


# ---- What users do to modules ---------------------------------------------------------------------------------------


def test_hooks_fire_on_every_sub_module():
    """Each sub-module's hook sees what the original's would see, and the outputs stay the same."""
    model, x = build(vis=True), images()
    expected = model(x)[0]
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i, o))))
    hooked = model(x)[0]
    torch.testing.assert_close(hooked, expected)
    leaves = {name for name, m in model.named_modules() if name and not isinstance(m, nn.ModuleList)}
    assert set(seen) == leaves
    state = model.state_dict()
    p = "transformer.encoder.layer.0"
    normalised = oracle.layer_norm(seen[p][0][0], state, f"{p}.attention_norm")
    torch.testing.assert_close(seen[f"{p}.attn.query"][1], oracle.linear(normalised, state, f"{p}.attn.query"))
    attended = seen[f"{p}.attn"][1][0]
    torch.testing.assert_close(attended, seen[f"{p}.attn.proj_dropout"][1])  # without the residual
    before_gelu = oracle.linear(seen[f"{p}.ffn"][0][0], state, f"{p}.ffn.fc1")
    torch.testing.assert_close(seen[f"{p}.ffn.fc1"][1], before_gelu)
    torch.testing.assert_close(seen[p][1][0], seen[p][0][0] + attended + seen[f"{p}.ffn"][1])
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x)
    assert not seen


@pytest.mark.parametrize("where", ["attn", "attn.query", "attn.softmax", "attn.out", "ffn", "ffn.fc1", "ffn.dropout"])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_other_kinds_of_hooks_fire(where, kind):
    model = build()
    count = []
    getattr(model.transformer.encoder.layer[1].get_submodule(where), f"register_{kind}")(lambda *args: count.append(1))
    model(images(), labels_for(2)).backward()
    # The MLP's one dropout module is called twice.
    assert len(count) == (2 if where == "ffn.dropout" else 1)


def test_a_hook_may_change_the_result():
    model, x = build(), images()
    before = model(x)[0]
    model.transformer.encoder.layer[0].attn.value.register_forward_hook(lambda m, i, o: o * 0)
    assert not torch.allclose(model(x)[0], before)


def test_global_hooks_see_every_sub_module():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        build()(images())
    finally:
        handle.remove()
    assert seen.count("Linear") == 2 * 6 + 1 and "Softmax" in seen and "Conv2d" in seen


def test_copies_are_equal_and_independent():
    model, x = build(), images()
    expected = model(x)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for duplicate in copies:
        assert torch.equal(duplicate(x)[0], expected)


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model, x = build().train(), images()

    def run(through):
        torch.manual_seed(0)
        hidden = model.transformer.embeddings(x)
        for block in model.transformer.encoder.layer:
            hidden = through(block, hidden)[0]
        hidden.square().mean().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return [g for g in gradients if g is not None]

    plain = run(lambda block, h: block(h))
    torch.testing.assert_close(run(lambda block, h: checkpoint(block, h, use_reentrant=False)), plain)


def test_functional_call_and_transforms():
    model, x = build(), images()
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(other)
    torch.testing.assert_close(torch.func.functional_call(model, other, (x,))[0], expected(x)[0])

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x, labels_for(2)))

    gradients = torch.func.grad(loss)(other)
    expected(x, labels_for(2)).backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    # An ensemble: two models in one vmap.
    stacked = {name: torch.stack([p.detach(), other[name]]) for name, p in model.named_parameters()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,))[0])(stacked)
    torch.testing.assert_close(both, torch.stack([model(x)[0], expected(x)[0]]).detach(), check_stride=False)


def test_input_gradients_through_a_transform():
    model, x = build(), images(1)
    saliency = torch.func.grad(lambda image: model(image)[0][0, 3])(x)
    x.requires_grad_()
    model(x)[0][0, 3].backward()
    torch.testing.assert_close(saliency, x.grad)


@pytest.mark.parametrize("train", [False, True])
def test_compile_fullgraph(train):
    torch.compiler.reset()
    model, x = build(vis=True).train(train), images()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    if train:
        compiled(x, labels_for(2)).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x, labels_for(2)).backward()
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


def test_compile_with_inductor():
    torch.compiler.reset()
    model, x = build(small(layers=1)), images()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x)[0], model(x)[0])


def test_a_compiled_model_obeys_a_later_selection():
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.append({node.target for node in graph.graph.nodes})
        return graph.forward

    model, x = build(), images()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with vit_fast.use("reference"):
            compiled(x)
    assert F.scaled_dot_product_attention in seen[0] and F.scaled_dot_product_attention not in seen[1]


def test_export():
    model, x = build(vis=True), images()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
    for size in (2, 5):
        logits, attention = exported(images(size))
        torch.testing.assert_close(logits, model(images(size))[0])
        assert len(attention) == 2


def test_meta_device():
    with torch.device("meta"):
        model = VisionTransformer(small(), img_size=64, num_classes=CLASSES)
        assert model(torch.empty(4, 3, 64, 64))[0].shape == (4, CLASSES)
