"""The command line: its numbers are the model's, its pictures show the attention, and what it can't do it says in a line."""

import copy
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_support import CLASSES, DEMO, GRAY, HOT, ROOT, SMALL, as_model_sees, break_operation, tiny
from PIL import Image

from vit_fast import CONFIGS, VisionTransformer, attention_maps, backends, checkpoints, demo, extension, info, inputs
from vit_fast.cli import main
from vit_fast.configs import name_of
from vit_fast.ops.checks import dtype_name

# ---- Help, versions, the entry point --------------------------------------------------------------------------------

COMMANDS = ("info", "demo", "verify", "classify", "attention-map", "train")


def test_help_names_every_command_with_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", out, re.M) and f"                    vit-fast {name}" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: vit-fast {name}" in out and "examples:\n  vit-fast" in out


def test_without_a_command_it_helps(run):
    code, out, _ = run()
    assert code == 0 and "commands, each with an example" in out


def test_version(run):
    import vit_fast

    assert run("--version") == (0, f"vit_fast {vit_fast.__version__}\n", "")


def test_entry_point():
    [entry] = importlib.metadata.distribution("vit_fast").entry_points.select(group="console_scripts", name="vit-fast")
    assert entry.load() is main


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("PIL", "rich", "matplotlib", "skimage", "safetensors", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from vit_fast.cli import main
for arguments in (["info"], ["classify", "x.png", "--weights", "x.npz"], ["attention-map", "x.png", "-o", "y.png"], ["demo"]):
    print("exit code", main(arguments), file=sys.stderr)
"""


def test_without_the_extras(tmp_path):
    """`info` works with none of them; what needs one says so."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120
    )
    assert result.returncode == 0 and "What each operation takes" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0] == "exit code 0"
    assert lines[1::2] == [
        "vit-fast: reading a picture needs pillow: pip install 'vit_fast[cli]'",
        "vit-fast: attention-map needs matplotlib: pip install 'vit_fast[cli]'",
        "vit-fast: demo needs pillow: pip install 'vit_fast[cli]'",
    ]
    assert lines[2::2] == ["exit code 2"] * 3


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VIT_FAST_IMPL")}
    return {**env, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", **changes}


def test_as_a_process_with_ascii_output(weights, pictures):
    """A real process: exit code, no colours in a pipe, and an output that can't encode the bars."""
    command = [sys.executable, "-m", "vit_fast", "classify", pictures[0], "--weights", weights]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    assert "\x1b" not in result.stdout and "##" in result.stdout and result.stdout.isascii()


# ---- info -----------------------------------------------------------------------------------------------------------


def test_info(run):
    code, out, err = run("info")
    assert code == 0 and err == "" and "\x1b" not in out
    assert torch.__version__ in out and importlib.metadata.version("pillow") in out
    for name, reason in backends.backends().items():
        assert re.search(rf"^  {name} +{'runs' if reason is None else re.escape('no: ' + reason)}$", out, re.M)
    for op, taken in info.choices("cpu", torch.float32).items():
        assert re.search(rf"^  {op} +{taken}\b", out, re.M)
    for device in ("cpu", "cuda"):
        reason = extension.missing(device)
        says = re.escape(f"no: {reason}") if reason else "loaded"
        assert re.search(rf"^Extension\n(?:  .*\n)*  {device} +{says}", out, re.M)


def test_info_says_what_is_in_force(run):
    with backends.use("reference"):
        _, out, _ = run("info")
    assert "in force      reference" in out and re.search(r"attention +reference +reference", out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_typical_arguments_are_what_the_model_passes(monkeypatch, dtype):
    """Shapes, dtypes and everything else of one block of ViT-B/16, as the operations are called."""
    config = copy.deepcopy(CONFIGS["ViT-B_16"])
    config.transformer.num_layers = 1
    model = VisionTransformer(config, num_classes=1).eval().to(dtype)
    seen = {}
    original = backends.Operation.__call__

    def spy(self, *args):
        seen.setdefault(self.name, []).append([described(a) for a in args])
        return original(self, *args)

    def described(argument):
        if isinstance(argument, torch.Tensor):
            return tuple(argument.shape), dtype_name(argument.dtype), argument.device.type
        return argument

    monkeypatch.setattr(backends.Operation, "__call__", spy)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, dtype=dtype))
    typical = info.typical_arguments("cpu", dtype)
    assert set(typical) == set(seen) == set(backends.OPERATIONS)
    for op, arguments in typical.items():
        assert [described(a) for a in arguments] in seen[op], op


# ---- classify -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probabilities(pictures):
    model = tiny()
    with torch.no_grad():
        return [model(as_model_sees(path))[0][0].softmax(-1) for path in pictures]


def assert_classified(results, paths, probabilities, k=CLASSES):
    assert [r["image"] for r in results] == paths
    for result, expected in zip(results, probabilities, strict=True):
        top = expected.topk(k)
        assert [c["index"] for c in result["classes"]] == top.indices.tolist()
        assert [c["probability"] for c in result["classes"]] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_classify_is_the_models_softmax(run, weights, pictures, probabilities):
    code, out, err = run("classify", *pictures, "--weights", weights, "--json")
    assert code == 0 and err == ""
    assert_classified(json.loads(out), pictures, probabilities)
    assert len({int(p.argmax()) for p in probabilities}) > 0 and max(float(p.max()) for p in probabilities) > 0.3


@pytest.mark.parametrize("form", ["npz", "bin", "pt"])
def test_classify_reads_every_kind_of_file(form, run, folder, pictures, probabilities):
    """Model, image size and classes are read off the shapes."""
    path = folder / f"tiny.{form}"
    if form == "npz":
        np.savez(path, **checkpoints.to_google(tiny()))
    else:
        torch.save(tiny().state_dict(), path)
    code, out, _ = run("classify", pictures[0], "--weights", path, "--json", "--topk", 2)
    assert code == 0
    assert_classified(json.loads(out), pictures[:1], probabilities[:1], k=2)


def test_classify_as_text(run, weights, pictures, probabilities, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("tench\ngoldfish\ngreat white shark\nhäuschen\nhen\n", encoding="utf-8")
    code, out, _ = run("classify", pictures[0], "--weights", weights, "--labels", labels, "--topk", 99)
    assert code == 0 and out.startswith(f"ViT-Ti_16, 64x64 pixels, weights of {weights}, 5 classes\n\n{pictures[0]}\n")
    lines = out.splitlines()[3:]
    names = labels.read_text(encoding="utf-8").split("\n")
    order = probabilities[0].argsort(descending=True).tolist()
    assert len(lines) == CLASSES
    for line, i in zip(lines, order, strict=True):
        probability = float(probabilities[0][i])
        assert line.startswith("  " + names[i]) and f"{100 * probability:5.1f} %" in line
        assert abs(line.count("█") - 30 * probability) <= 1
    assert max(map(len, lines)) <= 100


def test_classify_options_reach_the_model(run, weights, pictures):
    expected = tiny(img_size=64)
    with torch.no_grad():
        logits = expected(as_model_sees(pictures[0], mean=0.4, std=0.2))[0]
    _, out, _ = run("classify", pictures[0], "--weights", weights, "--json", "--mean", "0.4", "--std", "0.2,0.2,0.2")
    assert json.loads(out)[0]["classes"][0]["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    resized = VisionTransformer(CONFIGS["ViT-Ti_16"], img_size=96, num_classes=CLASSES).eval()
    checkpoints.load(resized, weights)
    with torch.no_grad():
        logits = resized(as_model_sees(pictures[0], size=96))[0]
    _, out, _ = run("classify", pictures[0], "--weights", weights, "--json", "--img-size", 96)
    assert json.loads(out)[0]["classes"][0]["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    code, out, _ = run("classify", pictures[0], "--weights", weights, "--json", "--dtype", "bfloat16")
    assert code == 0 and abs(sum(c["probability"] for c in json.loads(out)[0]["classes"]) - 1) < 1e-5


@pytest.mark.parametrize(
    "text, names",
    [
        ('["a", "b", "c", "d", "e"]', "abcde"),
        ('{"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}', "abcde"),
        ('{"0": ["n1", "a"], "1": ["n2", "b"], "2": ["n3", "c"], "3": ["n4", "d"], "4": ["n5", "e"]}', "abcde"),
        ("a\nb\nc\nd\ne\n\n", "abcde"),
        ("\ufeffa\r\nb\r\nc\r\nd\r\ne", "abcde"),
        ('{"1": "b"}', [None, "b", None, None, None]),
    ],
)
def test_labels(text, names, run, weights, pictures, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(text.encode())
    _, out, _ = run("classify", pictures[0], "--weights", weights, "--labels", path, "--json")
    assert {c["index"]: c["label"] for c in json.loads(out)[0]["classes"]} == dict(enumerate(names))


def test_a_head_of_zeros_is_remarked_on(run, folder, pictures):
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    path = checkpoints.save(model, folder / "zeros.safetensors")
    code, _, err = run("classify", pictures[0], "--weights", path)
    assert code == 0 and "all zeros" in err and err.count("\n") == 1


def test_every_model_is_known_by_its_shapes():
    for name, config in CONFIGS.items():
        t = config.transformer
        assert name_of(config.hidden_size, t.mlp_dim, t.num_layers, config.patches.get("size")) == name
    assert name_of(192, 768, 11, (16, 16)) is None


def test_image_sizes_that_are_not_square_come_from_the_metadata(run, folder, pictures):
    model = tiny(img_size=(32, 96))
    path = checkpoints.save(model, folder / "wide.safetensors")
    pixels = np.asarray(Image.open(pictures[0]).resize((96, 32), Image.Resampling.BICUBIC))
    image = (torch.from_numpy(pixels.copy()).float() / 255 - 0.5).permute(2, 0, 1)[None] / 0.5
    with torch.no_grad():
        expected = model(image)[0].softmax(-1)
    _, out, _ = run("classify", pictures[0], "--weights", path, "--json")
    assert json.loads(out)[0]["classes"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-5)


# ---- Pictures -------------------------------------------------------------------------------------------------------

RGB = np.stack([GRAY, GRAY[::-1], 255 - GRAY], -1)


def transparent():
    alpha = np.zeros_like(GRAY)
    alpha[:, :3] = 255
    expected = RGB.copy()
    expected[:, 3:] = 255
    return Image.fromarray(np.dstack([RGB, alpha])), expected


def turned():
    """Stored on its side, with EXIF's order to turn it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90).save(buffer, "png", exif=exif)
    return Image.open(buffer), RGB


def palette():
    picture = Image.fromarray(GRAY).convert("P")
    picture.info["transparency"] = bytes(0 if i == int(GRAY[0, 0]) else 255 for i in range(256))
    expected = np.stack([GRAY] * 3, -1)
    expected[0, 0] = 255
    return picture, expected


KINDS = {
    "rgb": lambda: (Image.fromarray(RGB), RGB),
    "gray": lambda: (Image.fromarray(GRAY), np.stack([GRAY] * 3, -1)),
    "16 bits": lambda: (Image.fromarray(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, -1)),
    "1 bit": lambda: (Image.fromarray(GRAY > 100), np.stack([np.uint8(255) * (GRAY > 100)] * 3, -1)),
    "transparent": transparent,
    "palette": palette,
    "turned": turned,
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_read_as_people_see_them(kind, tmp_path):
    picture, expected = KINDS[kind]()
    options = {"exif": picture.getexif()} if kind == "turned" else {}
    picture.save(tmp_path / "picture.png", **options)
    read = inputs.read_picture(tmp_path / "picture.png")
    assert read.mode == "RGB" and np.array_equal(np.asarray(read), expected)


def test_tiff_of_32_bit_integers_and_cmyk(tmp_path):
    Image.fromarray(GRAY.astype(np.int32) * 257).save(tmp_path / "deep.tiff")
    assert np.array_equal(np.asarray(inputs.read_picture(tmp_path / "deep.tiff"))[..., 0], GRAY)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.tiff")
    assert inputs.read_picture(tmp_path / "print.tiff").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(48, 32), (32, 48)])
def test_as_images(size):
    picture = Image.fromarray(RGB)
    images = inputs.as_images([picture, picture], size, mean=(0.1, 0.2, 0.3), std=(0.5,))
    assert images.shape == (2, 3, *size) and images.dtype == torch.float32
    pixels = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)).astype(float) / 255
    expected = ((pixels - [0.1, 0.2, 0.3]) / 0.5).transpose(2, 0, 1)
    assert np.abs(images[1].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("name, keep", [("cut.png", 0.6), ("cut.jpg", 0.6), ("cut.webp", 0.6)])
def test_a_cut_off_picture_is_refused(name, keep, refused, weights, folder, pictures):
    Image.open(pictures[0]).save(folder / "whole.png")
    Image.open(pictures[0]).save(folder / name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])
    message = refused("classify", folder / name, "--weights", weights)
    assert name in message and ("is damaged" in message or "no picture that Pillow can read" in message)


# ---- attention-map --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hot(folder):
    """Weights whose class token attends, in the last layer's head 0, to one patch; evenly everywhere else."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for block in model.transformer.encoder.layer:
            block.attention_norm.weight.fill_(1)
        token = 1 + HOT[0] * 4 + HOT[1]
        model.transformer.embeddings.position_embeddings[0, token, 7] = 10  # nothing but this channel tells tokens apart
        last = model.transformer.encoder.layer[-1].attn
        last.key.weight[0, 7] = 1
        last.query.bias[0] = 20
    return str(checkpoints.save(model, folder / "hot.safetensors"))


def brightest(path, rows=4, columns=4):
    """The patch of the picture with the most light."""
    light = np.asarray(Image.open(path).convert("L")).astype(float)
    height, width = light.shape
    cells = [
        [light[r * height // rows : (r + 1) * height // rows, c * width // columns : (c + 1) * width // columns].mean()
         for c in range(columns)]
        for r in range(rows)
    ]  # fmt: skip
    cells = np.array(cells)
    return np.unravel_index(cells.argmax(), cells.shape), cells.max() - np.median(cells)


@pytest.mark.parametrize("options", [(), ("--head", 0), ("--layer", 11, "--head", "mean"), ("--rollout",)])
def test_the_hot_spot_is_where_the_attention_is(options, run, hot, tmp_path):
    Image.new("RGB", (120, 80), (90, 90, 90)).save(tmp_path / "flat.png")
    code, out, err = run("attention-map", tmp_path / "flat.png", "-o", tmp_path / "map.png", "--weights", hot, *options)
    assert code == 0 and err == "" and str(tmp_path / "map.png") in out
    with Image.open(tmp_path / "map.png") as result:
        assert result.size == (120, 80)
    patch, contrast = brightest(tmp_path / "map.png")
    assert patch == HOT and contrast > 40


@pytest.mark.parametrize("options", [("--head", 1), ("--layer", 0), ("--layer", -12, "--head", 0)])
def test_other_heads_and_layers_are_even(options, run, hot, tmp_path):
    Image.new("RGB", (120, 80), (90, 90, 90)).save(tmp_path / "flat.png")
    code, out, _ = run("attention-map", tmp_path / "flat.png", "-o", tmp_path / "map.png", "--weights", hot, *options)
    assert code == 0 and "1.00 to 1.00 times the mean" in out
    assert len(Image.open(tmp_path / "map.png").getcolors()) == 1


def test_attention_map_without_weights_says_so(run, pictures, tmp_path):
    arguments = ("attention-map", pictures[0], "-o", tmp_path / "map.jpg", "--model", "ViT-Ti_16", "--img-size", 32)
    code, out, _ = run(*arguments)
    assert code == 0 and "random weights" in out and "Random weights:" in out and (tmp_path / "map.jpg").stat().st_size


def test_class_attention_and_rollout_are_the_formulas():
    torch.manual_seed(0)
    weights = [torch.rand(2, 3, 7, 7).softmax(-1) for _ in range(4)]
    maps = attention_maps.class_attention(weights, (2, 3), layer=1, head=2)
    assert torch.equal(maps[1], weights[1][1, 2, 0, 1:].view(2, 3))
    mean = attention_maps.class_attention(weights, (2, 3), layer=-2)
    assert torch.allclose(mean[0], sum(weights[2][0, h, 0, 1:] for h in range(3)).view(2, 3) / 3)
    rows = [layer[:, :, 0] for layer in weights]  # as a frozen model gives them
    assert torch.equal(attention_maps.class_attention(rows, (2, 3), layer=1, head=2), maps)

    product = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    for layer in weights:  # Abnar & Zuidema, from the first layer on, all of the matrix
        mixed = 0.5 * layer.double().mean(1) + 0.5 * torch.eye(7, dtype=torch.float64)
        product = (mixed / mixed.sum(-1, keepdim=True)) @ product
    rolled = attention_maps.rollout(weights, (2, 3))
    assert rolled.dtype == torch.float32 and torch.allclose(rolled.double(), product[:, 0, 1:].view(2, 2, 3), atol=1e-7)
    assert torch.equal(attention_maps.rollout([layer.mean(1) for layer in weights], (2, 3)), rolled)


def test_attention_that_is_not_finite_is_refused(refused, hot, folder, pictures, tmp_path):
    state = checkpoints.read_state_dict(hot)
    state["transformer.embeddings.cls_token"][:] = float("nan")
    torch.save(state, folder / "nan.pt")
    message = refused("attention-map", pictures[0], "-o", tmp_path / "map.png", "--weights", folder / "nan.pt")
    assert "not finite" in message and not (tmp_path / "map.png").exists()
    assert "logits are not finite" in refused("classify", pictures[0], "--weights", folder / "nan.pt")


# ---- verify ---------------------------------------------------------------------------------------------------------


def verified(out):
    """Layer → (error, reference's error, budget, verdict) of the printed table."""
    number = r"([\d.]+e[+-]\d+|inf|nan)"
    rows = re.findall(rf"^  (\S[\w ]*?) +{number} +{number} +{number} .*?(ok|OVER)$", out, re.M)
    return {name: (float(e), float(r), float(b), verdict) for name, e, r, b, verdict in rows}


def test_verify(run):
    code, out, err = run("verify", *SMALL)
    rows = verified(out)
    assert code == 0 and err == "" and "All 15 are within the budget" in out
    assert list(rows) == ["embeddings", *(f"layer {i}" for i in range(12)), "last norm", "logits"]
    assert all(0 < reference < budget and error <= budget for error, reference, budget, _ in rows.values())
    assert max(map(len, out.splitlines())) <= 100 and "\x1b" not in out


def test_verify_on_pictures_with_weights_and_attention(run, weights, pictures):
    code, out, _ = run("verify", *pictures, "--weights", weights, "--vis", "--implementation", "torch")
    rows = verified(out)
    assert code == 0 and len(rows) == 27 and "3 pictures" in out and rows["attention 11"][3] == "ok"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_verify_of_what_freeze_makes(run, weights, pictures, dtype):
    code, out, _ = run("verify", *pictures, "--weights", weights, "--vis", "--implementation", "frozen", "--dtype", dtype)
    assert code == 0 and "frozen against reference" in out and "All 27 are within the budget" in out


def test_verify_in_half_precision_against_torch(run):
    code, out, _ = run(
        "verify", *SMALL, "--dtype", "bfloat16", "--implementation", "reference", "--against", "torch", "--batch", 1
    )
    rows = verified(out)
    assert code == 0 and "1 random image, bfloat16" in out and rows["logits"][1] > 1e-4


def test_verify_finds_the_broken_layer(run, monkeypatch):
    break_operation(monkeypatch, "mlp", lambda y: y * 1.001)
    code, out, _ = run("verify", *SMALL)
    rows = verified(out)
    assert code == 1 and rows["embeddings"][3] == "ok" and rows["layer 0"][3] == "OVER" and rows["logits"][3] == "OVER"
    assert "14 of 15 over the budget: layer 0, layer 1" in out


def test_verify_finds_broken_attention_weights(run, monkeypatch):
    def change(result):
        context, probabilities = result
        return context, None if probabilities is None else probabilities.flip(1)

    break_operation(monkeypatch, "attention", change)
    assert run("verify", *SMALL)[0] == 0
    code, out, _ = run("verify", *SMALL, "--vis")
    rows = verified(out)
    assert code == 1 and {name for name, row in rows.items() if row[3] == "OVER"} == {f"attention {i}" for i in range(12)}


def test_verify_finds_nan(run, monkeypatch):
    break_operation(monkeypatch, "layer_norm", lambda y: y * float("nan"))
    code, out, _ = run("verify", *SMALL)
    assert code == 1 and verified(out)["layer 3"][0] == float("inf")


def test_verify_leaves_no_hooks_and_no_selection():
    loaded = inputs.load("ViT-Ti_16", None, (32, 32))
    from vit_fast.verify import compare

    compare(loaded, torch.zeros(1, 3, 32, 32), "torch", "reference", True)
    assert not any(m._forward_hooks for m in loaded.model.modules()) and backends.selected() == "auto"
    assert loaded.model(torch.zeros(1, 3, 32, 32))[1] == []


def test_a_named_implementation_never_falls_back(refused, monkeypatch):
    monkeypatch.setattr(backends, "backends", lambda: {"triton": "no CUDA device", "reference": None})
    assert "triton can't run here: no CUDA device" in refused("verify", *SMALL, "--implementation", "triton")
    assert "triton can't run here: no CUDA device" in refused("verify", *SMALL, "--against", "triton")


def test_an_operation_without_the_named_implementation(run, monkeypatch):
    monkeypatch.setattr(backends, "backends", lambda: {"cpp": None, "reference": None})
    monkeypatch.setattr(backends.OPERATIONS["mlp"], "implementations", {})
    code, _, err = run("verify", *SMALL, "--implementation", "cpp")
    assert code == 2 and "implementation 'cpp' cannot run" in err and err.count("\n") == 1


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_demo(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*DEMO)
    written = tmp_path / "demo-output" / "attention-map.png"
    assert code == 0 and err == "" and f"written: {written}" in out and "\x1b" not in out
    assert "of 1000 right" in out and written.with_name("digits.png").is_file()
    assert "4, from scikit-image" in out and "random weights" in out and "Untrained attention is close to even" in out
    assert "All 14 are within the budget" in out
    for batch in (1, 3):
        assert re.search(rf"^ +{batch} +[\d.e+]+ ms +[\d.e+]+ ms +[\d.]+x +[\d.]+-[\d.]+ +2$", out, re.M), out
    with Image.open(written) as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 800
        assert len(set(sheet.resize((50, 50)).get_flattened_data())) > 200  # photographs, not a blank page


def test_demo_on_pictures_and_weights(run, pictures, weights, tmp_path):
    code, out, _ = run("demo", *pictures[:2], "--weights", weights, "--batch", 1, "--rounds", 1, "-o", tmp_path / "look.png")
    assert code == 0 and "2, yours" in out and "Untrained" not in out and (tmp_path / "look.png").exists()


def test_demo_fails_when_the_fast_path_is_wrong(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()  # as in a second run
    break_operation(monkeypatch, "linear", lambda y: y * 1.01)
    code, out, _ = run(*DEMO)
    assert code == 1 and "OVER" in out and (tmp_path / "demo-output" / "attention-map.png").exists()


def test_demo_downloads_nothing(refused, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("eagle.png",))  # known to skimage.data, but not in the wheel
    assert "has no photographs" in refused(*DEMO)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert "pip install scikit-image" in refused(*DEMO)


def test_the_photographs_are_in_the_wheel():
    assert [p.size for p in demo._photographs([])] == [(448, 448)] * 4


def test_timing_goes_by_turns(monkeypatch):
    seen = []
    loaded = inputs.load("testing", None, (16, 16))
    monkeypatch.setattr(loaded.model, "forward", lambda images: seen.append(backends.selected()))
    reference, fast = demo._by_turns(loaded.model, torch.zeros(1, 3, 16, 16), None)
    assert seen == ["reference", "auto"] * (len(reference) + 1) and len(reference) == len(fast) == demo.MOST
