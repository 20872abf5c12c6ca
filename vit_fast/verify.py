"""Two implementations side by side, layer by layer, each against float64: what ``vit-fast verify`` and ``demo`` print."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor

from vit_fast import backends, freeze
from vit_fast.inputs import Loaded
from vit_fast.terminal import progress, styled, table
from vit_fast.testing import Error, error


def outputs(loaded: Loaded, images: Tensor, implementation: str, vis: bool, advance: Callable[[], None]) -> dict[str, Tensor]:
    """What every layer gives, by name, on the CPU; the attention weights too with ``vis``.

    The hooks are on modules that hold fused paths, not inside them, so what runs is what runs without hooks.
    """
    if implementation == "frozen":
        return _frozen_outputs(loaded, images, vis, advance)
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            found[name] = output.detach().to("cpu", copy=True)  # a later layer may work in place
            advance()

        return hook

    transformer = loaded.model.transformer
    watched = {"embeddings": transformer.embeddings}
    watched |= {f"layer {i}": block for i, block in enumerate(transformer.encoder.layer)}
    watched |= {"last norm": transformer.encoder.encoder_norm}
    loaded.show_attention(vis)
    with contextlib.ExitStack() as stack:
        stack.callback(loaded.show_attention, False)
        for name, module in watched.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        stack.enter_context(backends.use(implementation))
        stack.enter_context(torch.no_grad())
        logits, weights = loaded.model(images)
    found["logits"] = logits.cpu()
    return found | {f"attention {i}": w.cpu() for i, w in enumerate(weights)}


def _frozen_outputs(loaded: Loaded, images: Tensor, vis: bool, advance: Callable[[], None]) -> dict[str, Tensor]:
    """The same of what `freeze` makes of the model; the logits from a call of their own, whose last block is shorter."""
    frozen = freeze(loaded.model, dtype=images.dtype, check=False)
    attention = ("attention",) if vis else ()
    results = frozen(images, outputs=("embeddings", "layer", "tokens", *attention))
    found = {"embeddings": results["embeddings"], "last norm": results["tokens"]}
    found |= {f"layer {i}": layer for i, layer in enumerate(results["layer"])}
    found |= {f"attention {i}": weights for i, weights in enumerate(results.get("attention", ()))}
    found["logits"] = frozen(images, outputs="logits")["logits"]
    for _ in range(loaded.layers + 2):
        advance()
    return {name: tensor.cpu() for name, tensor in found.items()}


def compare(loaded: Loaded, images: Tensor, implementation: str, against: str, vis: bool) -> dict[str, Error]:
    """The errors of ``implementation``, by layer, with the budget that those of ``against`` give it (`vit_fast.testing`).

    float64 means the reference in float64, with the weights and images as they are in the model's own dtype.
    """
    parameter = next(loaded.model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    steps = 3 * (loaded.layers + 2)
    with progress(f"{implementation}, {against} and float64", steps) as advance:
        actual = outputs(loaded, images, implementation, vis, advance)
        baseline = outputs(loaded, images, against, vis, advance)
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if parameter.device.type == "mps" else parameter.device
        wide = Loaded(copy.deepcopy(loaded.model).to(device).double(), loaded.name, loaded.weights)
        exact = outputs(wide, images.to(device).double(), "reference", vis, advance)
    return {name: error(actual[name], baseline[name], exact[name]) for name in exact}


def errors_table(errors: dict[str, Error], against: str) -> str:
    """One row a layer: its error, the other implementation's, the budget, and how much of it is used."""
    rows, styles = [], []
    for name, e in errors.items():
        used = f"{100 * e.value / e.budget:.0f} %" if e.budget else "-"
        rows.append((name, f"{e.value:.2e}", f"{e.reference:.2e}", f"{e.budget:.2e}", used, "ok" if e.ok else "OVER"))
        styles.append("green" if e.ok else "red")
    return table(("", "error", f"{against}'s", "budget", "used", ""), rows, styles=styles)


def verdict(errors: dict[str, Error]) -> str:
    over = [name for name, e in errors.items() if not e.ok]
    if not over:
        return styled(f"All {len(errors)} are within the budget.", "green")
    named = ", ".join(over[:6]) + (", …" if len(over) > 6 else "")
    return styled(f"{len(over)} of {len(errors)} over the budget: {named}.", "red")
