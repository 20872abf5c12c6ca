"""The command line ``vit-fast``: what it takes, and what it prints.

Exit codes: 0 all is well · 1 an implementation is over the error budget · 2 something the user can mend, said in one line on
stderr · 130 interrupted. Everything that computes is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys

from vit_fast.benchmarks import command as bench
from vit_fast.benchmarks import tune
from vit_fast.configs import CONFIGS
from vit_fast.terminal import CommandError, bar, needs, note, one_line, progress, styled
from vit_fast.train.command import add_train_command

_DESCRIPTION = """\
Fast Vision Transformers: see what runs here, check that it is right, and use it.
"""

_COMMANDS = """\
commands, each with an example:
  info            versions, devices, what runs here and why not the rest
                    vit-fast info
  demo            parity, speed and attention maps on photographs, in about half a minute
                    vit-fast demo
  verify          every layer of two implementations side by side, errors against float64
                    vit-fast verify --model ViT-L_16 --dtype bfloat16
  classify        what is in a picture, by trained weights
                    vit-fast classify cat.jpg --weights ViT-B_16.npz --labels labels.txt
  attention-map   where the model looks, as an overlay on the picture
                    vit-fast attention-map cat.jpg -o map.png --weights ViT-B_16.npz --rollout
  bench           what is faster than what on this machine, and how far from its limits
                    vit-fast bench --minutes 5 --html bench.html
  tune            times each operation's implementations here, for `auto` to take the fastest
                    vit-fast tune --models B
  train           on pictures in folders, arrays, or digits; stopped at any moment, it goes on
                    vit-fast train photos -o run --weights ViT-B_16.npz --flip

`vit-fast COMMAND --help` explains one of them.
"""


# ---- What options may be --------------------------------------------------------------------------------------------


def _model_name(text: str) -> str:
    if text in CONFIGS:
        return text
    by_lower = {name.lower(): name for name in CONFIGS}
    close = [by_lower[name] for name in difflib.get_close_matches(text.lower(), by_lower, n=2, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise argparse.ArgumentTypeError(f"there is no model {text!r}.{hint} There are {', '.join(CONFIGS)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return int(text)


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 1 <= int(side) <= 4096 for side in sides):
        raise argparse.ArgumentTypeError(
            f"pixels from 1 to 4096 are needed, such as 224, or 224x384 (height x width), got {text!r}"
        )
    return int(sides[0]), int(sides[-1])


def _batches(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _channels(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"one number, or three with commas between (red, green, blue), is needed, got {text!r}"
        )
    return values


def _deviations(text: str) -> tuple[float, ...]:
    values = _channels(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"standard deviations are above 0, got {text!r}")
    return values


def _head(text: str) -> int | str:
    if text == "mean":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'mean' or the number of a head, from 0 on, is needed, got {text!r}")
    return int(text)


# ---- The parser -----------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=100)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="vit-fast",
        usage="vit-fast COMMAND …",
        description=_DESCRIPTION,
        epilog=_COMMANDS,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(run=lambda arguments: parser.print_help() or 0)
    commands = parser.add_subparsers(metavar="COMMAND", help=argparse.SUPPRESS, parser_class=_Parser, title=argparse.SUPPRESS)

    def command(name, run, arguments, description, examples):
        sub = commands.add_parser(
            name,
            prog=f"vit-fast {name}",
            usage=f"vit-fast {name} {arguments}".rstrip(),
            description=description,
            epilog="examples:\n" + "\n".join(f"  vit-fast {name} {example}".rstrip() for example in examples),
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        return sub

    def model_options(sub, weights_required=False):
        sub.add_argument(
            "--weights",
            metavar="FILE",
            required=weights_required,
            help="Google's .npz, or a state dict: .safetensors, .bin, .pt"
            + ("" if weights_required else "; default: random weights"),
        )
        sub.add_argument(
            "--model",
            type=_model_name,
            metavar="NAME",
            help="such as ViT-B_16; default: the one that the file's shapes tell, or ViT-B_16",
        )
        sub.add_argument(
            "--img-size",
            type=_image_size,
            metavar="PIXELS",
            help="pictures are resized to it; default: the file's size, or 224",
        )
        sub.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: cuda if there is one, else cpu")
        sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: float32")

    def normalisation(sub):
        sub.add_argument(
            "--mean",
            type=_channels,
            default=(0.5,),
            metavar="M",
            help="of the training images' channels, in 0…1, one or three as R,G,B; default: 0.5",
        )  # noqa: E501
        sub.add_argument(
            "--std", type=_deviations, default=(0.5,), metavar="S", help="likewise; default: 0.5, as Google trained"
        )

    command("info", _info, "", "Versions, devices, what runs here, what each operation would take, and why not the rest.", [""])

    sub = command(
        "demo",
        _demo,
        "[IMAGE …] [options]",
        "The reference and the fast path on photographs: how far each is from float64, how fast each is here,\n"
        "and an attention map as a picture. Exit code 0 only if the fast path is within the error budget.",
        ["", "--weights ViT-B_16.npz", "cat.jpg dog.jpg --batch 1,8,32 --output look.png"],
    )
    sub.add_argument("images", nargs="*", metavar="IMAGE", help="pictures; default: photographs from scikit-image")
    model_options(sub)
    sub.add_argument("--batch", type=_batches, default=[1, 8], metavar="N,…", help="batch sizes to time; default: 1,8")
    sub.add_argument("--rounds", type=_positive, metavar="N", help="of timing; default: what fits in 12 seconds, 3 to 25")
    default = os.path.join("demo-output", "attention-map.png")
    sub.add_argument("-o", "--output", default=default, metavar="FILE", help=f"the attention map; default: {default}")

    sub = command(
        "verify",
        _verify,
        "[IMAGE …] [options]",
        "Runs two implementations side by side and prints, for every layer, how far each is from float64, next to the\n"
        "error budget: 2 × the error of the one + one rounding step. Exit code 1 if anything is over it.",
        ["", "cat.jpg dog.jpg --weights ViT-B_16.npz --vis", "--model ViT-H_14 --implementation triton --dtype bfloat16"],
    )
    sub.add_argument("images", nargs="*", metavar="IMAGE", help="pictures; default: random values")
    model_options(sub)
    implementations = ("auto", "reference", "torch", "triton", "cpp")
    sub.add_argument(
        "--implementation",
        choices=(*implementations, "frozen"),
        default="auto",
        help="the one to check, or frozen for what vit_fast.freeze makes of the model; default: auto",
    )
    sub.add_argument(
        "--against", choices=implementations, default="reference", help="whose error sets the budget; default: reference"
    )
    sub.add_argument("--batch", type=_positive, metavar="N", help="how many random images, when none are named; default: 2")
    sub.add_argument("--vis", action="store_true", help="with the attention weights, and on the path that returns them")
    normalisation(sub)

    sub = command(
        "classify",
        _classify,
        "IMAGE … --weights FILE [options]",
        "What is in each picture, by the weights and classes of a file. Model and image size are read off the file.",
        [
            "cat.jpg --weights ViT-B_16.npz --labels labels.txt",
            "*.jpg --weights my.safetensors --topk 3 --json",
        ],
    )
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    model_options(sub, weights_required=True)
    sub.add_argument("--labels", metavar="FILE", help="the classes' names: one a line, a JSON list, or JSON {index: name}")
    sub.add_argument("--topk", type=_positive, default=5, metavar="K", help="how many classes to print; default: 5")
    sub.add_argument("--json", action="store_true", help="print JSON")
    normalisation(sub)

    sub = command(
        "attention-map",
        _attention_map,
        "IMAGE -o FILE [options]",
        "How much the class token attends to each part of the picture, as an overlay on it: one layer's heads averaged,\n"
        "one head, or rollout, which follows attention through all layers (Abnar & Zuidema 2020).",
        [
            "cat.jpg -o map.png --weights ViT-B_16.npz",
            "cat.jpg -o map.png --weights ViT-B_16.npz --rollout",
            "cat.jpg -o map.png --weights ViT-B_16.npz --layer 5 --head 3",
        ],
    )
    sub.add_argument("image", metavar="IMAGE")
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write: .png, .jpg or .webp")
    model_options(sub)
    sub.add_argument("--layer", type=int, metavar="N", help="from 0 on, or from the last with -1; default: -1")
    sub.add_argument("--head", type=_head, metavar="mean|N", help="default: mean, of all heads")
    sub.add_argument("--rollout", action="store_true", help="through all layers and heads")
    normalisation(sub)

    add_train_command(command, _model_name, _image_size, _channels, _deviations)
    bench.add_options(command("bench", bench.run, "[options]", bench.DESCRIPTION, bench.EXAMPLES))
    tune.add_options(command("tune", tune.run, "[options]", tune.DESCRIPTION, tune.EXAMPLES))
    return parser


# ---- Commands -------------------------------------------------------------------------------------------------------


def _info(arguments) -> int:
    from vit_fast.info import show

    return show()


def _demo(arguments) -> int:
    from vit_fast.demo import run

    return run(arguments)


def _verify(arguments) -> int:
    from vit_fast import backends
    from vit_fast.inputs import SEED, as_images, read_picture
    from vit_fast.testing import randn
    from vit_fast.verify import compare, errors_table, verdict

    if arguments.images and arguments.batch:
        raise CommandError("--batch says how many random images to make: leave it out, or the pictures")
    for name in (arguments.implementation, arguments.against):
        reason = None if name in ("auto", "frozen") else backends.backends()[name]
        if reason is not None:
            raise CommandError(f"the implementation {name} can't run here: {reason} (vit-fast info lists what can)")
    pictures = [read_picture(path) for path in arguments.images]
    loaded = _load(arguments)
    if pictures:
        images = as_images(pictures, loaded.size, arguments.mean, arguments.std)
        what = f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
    else:
        images = randn(arguments.batch or 2, 3, *loaded.size, seed=SEED)
        what = f"{len(images)} random image{'s' * (len(images) > 1)}"
    print(f"{loaded}; {what}, {arguments.dtype}, {next(loaded.model.parameters()).device}")
    print(
        f"{arguments.implementation} against {arguments.against}: largest distance from float64, beside the budget", flush=True
    )
    errors = compare(loaded, images, arguments.implementation, arguments.against, arguments.vis)
    print(errors_table(errors, arguments.against))
    print(f"  budget = 2 × {arguments.against}'s error + one rounding step. {verdict(errors)}")
    return 0 if all(e.ok for e in errors.values()) else 1


def _classify(arguments) -> int:
    from vit_fast import freeze
    from vit_fast.inputs import as_images, read_picture

    pictures = [read_picture(path) for path in arguments.images]
    loaded = _load(arguments, need_head=True)
    labels = _labels(arguments.labels, loaded.model.num_classes) if arguments.labels else {}
    with progress("freezing the model"):
        fast = freeze(loaded.model, dtype=next(loaded.model.parameters()).dtype, check=False)
    results = []
    with progress("classifying", len(pictures)) as advance:
        for path, picture in zip(arguments.images, pictures, strict=True):
            image = as_images([picture], loaded.size, arguments.mean, arguments.std)
            logits = fast(image.to(fast.device))[0][0].float()
            if not bool(logits.isfinite().all()):
                remedy = "the weights may be damaged" if arguments.dtype == "float32" else "try --dtype float32"
                raise CommandError(f"{path}: the logits are not finite in {arguments.dtype}: {remedy}")
            top = logits.softmax(-1).topk(min(arguments.topk, len(logits)))
            classes = [
                {"index": i, "label": labels.get(i), "probability": p}
                for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            results.append({"image": path, "classes": classes})
            advance()
    if not bool(loaded.model.head.weight.any()):
        note(f"the head in {arguments.weights} is all zeros, as in Google's ImageNet-21k files: every class is as likely")
    if arguments.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return 0
    print(f"{loaded}, {loaded.model.num_classes} classes")
    for result in results:
        print("\n" + styled(result["image"], "bold"))
        names = [c["label"] or f"class {c['index']}" for c in result["classes"]]
        width = min(48, max(map(len, names)))
        for name, c in zip(names, result["classes"], strict=True):
            name = name if len(name) <= width else name[: width - 1] + "…"
            drawn = styled(bar(c["probability"], 30).rstrip(), "cyan")
            print(f"  {name:<{width}}  {100 * c['probability']:5.1f} %  {drawn}".rstrip())
    return 0


def _labels(path: str, classes: int) -> dict[int, str]:
    """Index → name, from a file with one name a line, a JSON list, or a JSON object whose keys are indices."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        raise CommandError(f"no such file with labels: {path}") from None
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8 text: labels are one a line, a JSON list, or JSON {{index: name}}") from None
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror}") from None
    content: list | dict = text.rstrip().splitlines()
    if text.lstrip()[:1] in ("[", "{"):
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise CommandError(f"{path} begins as JSON, but is not: {error}") from None
    if isinstance(content, list):
        if len(content) != classes:
            raise CommandError(f"{path} has {len(content)} labels, the weights have {classes} classes: they must be as many")
        content = dict(enumerate(content))
    try:
        # ImageNet's well-known index has pairs (WordNet's number, name).
        labels = {int(key): str(value[-1] if isinstance(value, list) else value).strip() for key, value in content.items()}
    except (ValueError, IndexError):
        raise CommandError(
            f'{path}: a JSON object with labels must have whole numbers as keys, such as {{"0": "cat"}}'
        ) from None
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        wrong = next(i for i in labels if not 0 <= i < classes)
        raise CommandError(f"{path} names class {wrong}, the weights have the classes 0 to {classes - 1}")
    return labels


def _attention_map(arguments) -> int:
    from vit_fast import attention_maps, freeze
    from vit_fast.inputs import as_images, checked_output, read_picture, save_picture

    needs("attention-map", "matplotlib")
    if arguments.rollout and (arguments.layer is not None or arguments.head is not None):
        raise CommandError("--rollout goes through all layers and heads: leave out --layer and --head")
    output = checked_output(arguments.output)
    picture = read_picture(arguments.image)
    if output.exists() and os.path.samefile(output, arguments.image):
        raise CommandError(f"{output} is the picture itself: name another file with -o")
    loaded = _load(arguments)
    layer = -1 if arguments.layer is None else arguments.layer
    head = None if arguments.head == "mean" else arguments.head
    if not -loaded.layers <= layer < loaded.layers:
        n = loaded.layers
        raise CommandError(f"--layer {layer}: {loaded.name} has {n} layers, 0 to {n - 1}, or -1 to {-n} from the last")
    if head is not None and head >= loaded.heads:
        raise CommandError(f"--head {head}: {loaded.name} has {loaded.heads} heads, 0 to {loaded.heads - 1}, or 'mean'")
    with progress("computing attention"):
        fast = freeze(loaded.model, dtype=next(loaded.model.parameters()).dtype, check=False)
        images = as_images([picture], loaded.size, arguments.mean, arguments.std).to(fast.device)
        if arguments.rollout:
            means = fast(images, outputs="attention_mean")["attention_mean"]
            attention, what = attention_maps.rollout(means, loaded.grid)[0], "rollout through all layers"
        else:
            rows = fast(images, outputs="attention_class_token")["attention_class_token"]
            attention = attention_maps.class_attention(rows, loaded.grid, layer, head)[0]
            what = f"layer {layer % loaded.layers}, " + ("mean of its heads" if head is None else f"head {head}")
        result = attention_maps.overlay(picture, attention)
    save_picture(result, output)
    print(f"{loaded}; {what}: {attention_maps.spread(attention)}")
    if not arguments.weights:
        print("Random weights: the map shows how it is made, not what a trained model looks at. Pass --weights.")
    print(f"written: {output.resolve()}")
    return 0


def _load(arguments, need_head=False):
    from vit_fast.inputs import load

    return load(
        arguments.model,
        arguments.weights,
        arguments.img_size,
        device=arguments.device,
        dtype=arguments.dtype,
        need_head=need_head,
    )


# ---- The entry point ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run ``vit-fast`` with these arguments, by default the process's; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character of a label or a path
    try:
        arguments = _parser().parse_args(argv)
        if arguments.version:
            from vit_fast import __version__

            print(f"vit_fast {__version__}")
            return 0
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print("vit-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vit-fast info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or _out_of_memory(error):
            return _failed("not enough memory: try fewer images, a smaller --img-size or a smaller --model")
        if "cannot run: " in str(error):  # a named implementation never falls back
            return _failed(error)
        raise


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _failed(error: Exception | str) -> int:
    print(f"vit-fast: {one_line(error)}", file=sys.stderr)
    return 2
