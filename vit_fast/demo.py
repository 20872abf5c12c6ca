"""``vit-fast demo``: a trained model reads digits; then, on photographs: is the fast path right, how fast is it here, and what
does the model look at.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from vit_fast import attention_maps, backends
from vit_fast.info import choices, processor
from vit_fast.inputs import DTYPES, Loaded, as_images, checked_output, load, read_picture, save_picture
from vit_fast.terminal import CommandError, needs, progress, styled, table
from vit_fast.verify import compare, errors_table, verdict

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
OUTPUT = Path("demo-output") / "attention-map.png"
SECONDS = 12  # of timing for each batch size, if that gives at least LEAST rounds
LEAST, MOST = 3, 25


def run(arguments) -> int:
    """0 if the fast path is within the error budget."""
    for module in ("PIL", "matplotlib"):  # before the first minute has passed
        needs("demo", module)
    pictures = _photographs(arguments.images)
    output = Path(arguments.output)
    if output == OUTPUT:
        _make_folder(output.parent)
    output = checked_output(str(output))
    if not arguments.images and not arguments.weights:  # whoever names either wants to see that alone
        from vit_fast import digits

        _heading("Digits: the trained model that ships, on 1,000 that it has not seen")
        digits.show(output.with_name("digits.png"))
        _heading("Photographs")
    loaded = load(arguments.model, arguments.weights, arguments.img_size, device=arguments.device, dtype=arguments.dtype)
    device = next(loaded.model.parameters()).device
    images = as_images(pictures, loaded.size).to(device, DTYPES[arguments.dtype])
    taken = ", ".join(sorted(set(choices(str(device), images.dtype).values())))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "cpu":
        where = f"{processor()}, {torch.get_num_threads()} threads"
    print(f"Model       {loaded}")
    if not arguments.weights:
        print("            With random weights its classes mean nothing; the speed is that of trained ones.")
    print(f"Photographs {len(pictures)}, {'from scikit-image' if not arguments.images else 'yours'}")
    print(f"Runs on     {where}, {arguments.dtype}")
    print(f"Fast path   what `auto` chooses here: {taken}; the reference is the original's computation, step by step")

    ok = _parity(loaded, images)
    _speed(loaded, images, arguments.batch, arguments.rounds)
    _look(loaded, images, pictures, output)
    return 0 if ok else 1


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} can't be made: {error.strerror}; name another place with --output") from None


def _photographs(paths: list[str]) -> list:
    """Square ones: those named, or those in scikit-image's wheel. Unlike skimage.data this never downloads what is missing."""
    from PIL import ImageOps

    if not paths:
        spec = importlib.util.find_spec("skimage")
        if spec is None:
            raise CommandError("demo takes its photographs from scikit-image: pip install scikit-image, or name pictures")
        folder = Path(spec.submodule_search_locations[0]) / "data"
        paths = [str(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()]
        if not paths:
            raise CommandError(f"scikit-image has no photographs in {folder}: name pictures of your own")
    return [ImageOps.fit(read_picture(path), (448, 448)) for path in paths]


def _heading(text: str) -> None:
    print("\n" + styled(text, "bold"), flush=True)


def _parity(loaded: Loaded, images: Tensor) -> bool:
    _heading("Parity: largest distance from float64, beside the budget")
    logits = compare(loaded, images, "auto", "reference", vis=False)
    # Asking for the attention weights takes another path through the attention.
    maps = compare(loaded, images, "auto", "reference", vis=True)
    errors = {"logits": logits["logits"], "logits, with maps": maps["logits"]}
    errors |= {name.replace("attention", "attention map of layer"): maps[name] for name in maps if name.startswith("attention")}
    print(errors_table(errors, "reference"))
    print("  budget = 2 × the reference's error + one rounding step.", verdict(errors))
    return all(e.ok for e in errors.values())


def _speed(loaded: Loaded, images: Tensor, batches: list[int], rounds: int | None) -> None:
    _heading("Speed: reference and fast path by turns, in one run")
    rows = []
    for batch in batches:
        repeated = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
        reference, fast = _by_turns(loaded.model, repeated, rounds)
        ratios = sorted(a / b for a, b in zip(reference, fast, strict=True))
        low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        times = [_milliseconds(statistics.median(seconds)) for seconds in (reference, fast)]
        rows.append((str(batch), *times, f"{statistics.median(ratios):.2f}x", f"{low:.2f}-{high:.2f}", str(len(ratios))))
    print(table(("images", "reference", "fast", "speed-up", "p20-p80", "rounds"), rows, left=0))
    print("  medians; the speed-up and its p20-p80 are of the rounds' own ratios, reference / fast")


def _milliseconds(seconds: float) -> str:
    digits = 0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2
    return f"{1000 * seconds:.{digits}f} ms"


def _by_turns(model, images: Tensor, rounds: int | None) -> tuple[list[float], list[float]]:
    """Seconds of each reference and each fast forward pass, A B A B …, after a round to warm up."""
    synchronize = torch.cuda.synchronize if images.device.type == "cuda" else lambda: None

    def once(implementation: str) -> float:
        with backends.use(implementation):
            synchronize()
            start = time.perf_counter()
            model(images)
            synchronize()
            return time.perf_counter() - start

    with torch.inference_mode():
        warm_up = once("reference") + once("auto")
        rounds = rounds or max(LEAST, min(MOST, int(SECONDS / warm_up)))
        reference, fast = [], []
        with progress(f"timing {len(images)} image{'s' * (len(images) > 1)}", rounds) as advance:
            for _ in range(rounds):
                reference.append(once("reference"))
                fast.append(once("auto"))
                advance()
    return reference, fast


def _look(loaded: Loaded, images: Tensor, pictures: list, output: Path) -> None:
    _heading("Attention: from the class token to the patches")
    loaded.show_attention(True)
    with torch.inference_mode(), progress("attention maps"):
        weights = loaded.model(images)[1]
        last, rollout = attention_maps.class_attention(weights, loaded.grid), attention_maps.rollout(weights, loaded.grid)
        untrained = ": attention is close to even" if loaded.weights.startswith("random") else ""
        title = f"{loaded}{untrained}; each overlay has its own scale"
        sheet = attention_maps.sheet(pictures, [("last layer", last), ("rollout", rollout)], title)
    loaded.show_attention(False)
    save_picture(sheet, output)
    print(f"  last layer, mean of its heads: {attention_maps.spread(last)}; rollout: {attention_maps.spread(rollout)}")
    if loaded.weights.startswith("random"):
        print("  Untrained attention is close to even: the overlays stretch what little there is. --weights gives real ones.")
    print(f"  written: {output.resolve()}")
