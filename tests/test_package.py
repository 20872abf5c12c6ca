"""What an installation needs, and what it must not: layouts, a foreign package named kernels, missing extras, import time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT = """
import json, sys
import vit_fast, vit_fast.kernels
import vit_fast.kernels.common
names = {"kernels": "kernels" in sys.modules, "file": vit_fast.kernels.common.__file__}
try:
    import kernels
    names["foreign"] = getattr(kernels, "WHOSE", None)
except ModuleNotFoundError:
    names["foreign"] = None
print(json.dumps(names))
"""


def run(code, *, path=(), cwd="/", python=sys.executable, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "VIT_FAST_IMPL")}
    env.update(environment, PYTHONPATH=os.pathsep.join(map(str, path)))
    return subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, timeout=180)


def imported(result):
    import json

    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Hugging Face publishes a package named kernels; this stands for it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("WHOSE = 'somebody else'\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is installed from: builds write beside the sources, and tests run beside each other."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("vit_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, checkout):
    """The wheel's content, unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "VIT_FAST_EXT": "off"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=checkout, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    import zipfile

    [file] = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("order", ["before", "after"])
def test_wheel_beside_a_foreign_kernels_package(wheel, foreign, order):
    path = [foreign, wheel] if order == "before" else [wheel, foreign]
    # -S keeps the editable installation of the checkout out of sight.
    names = imported(run(f"import sys; sys.path[:0] = {list(map(str, path))!r}" + IMPORT, path=[*path, *site_packages()]))
    assert Path(names["file"]) == wheel / "vit_fast" / "kernels" / "common.py"
    assert names["foreign"] == "somebody else" and not names["kernels"]


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    top = {p.name for p in wheel.iterdir()}
    assert {t for t in top if not t.endswith(".dist-info")} == {"vit_fast"}
    assert (wheel / "vit_fast" / "kernels.py").is_file() and (wheel / "vit_fast" / "ops" / "attention.py").is_file()
    assert not (wheel / "vit_fast" / "kernels" / "__init__.py").exists()
    weights = wheel / "vit_fast" / "weights"
    assert {p.name for p in weights.iterdir()} == {"README.md", "mnist-5k.safetensors"}
    assert (weights / "mnist-5k.safetensors").read_bytes() == (ROOT / "vit_fast/weights/mnist-5k.safetensors").read_bytes()


def site_packages():
    import torch

    return [Path(torch.__file__).parents[1]]


@pytest.mark.parametrize("foreign_first", [False, True])
def test_uninstalled_checkout(foreign, foreign_first):
    """PYTHONPATH at the repository root, where the folder kernels/ lies."""
    path = [foreign, ROOT] if foreign_first else [ROOT, foreign]
    names = imported(run(IMPORT, path=path))
    assert Path(names["file"]) == ROOT / "kernels" / "common.py"
    assert names["foreign"] == "somebody else", "our folder hides the package named kernels"


def test_editable_installation(tmp_path, foreign):
    site = tmp_path / "editable"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-t", str(site), "-e", "."]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "VIT_FAST_EXT": "off"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    code = f"import site; site.addsitedir({str(site)!r}); site.addsitedir({str(foreign)!r})" + IMPORT
    names = imported(run(code))
    assert Path(names["file"]) == ROOT / "kernels" / "common.py" and names["foreign"] == "somebody else"


def test_import_needs_torch_alone():
    blocked = ("triton", "PIL", "rich", "matplotlib", "scipy", "safetensors", "ml_collections", "skimage", "pytest")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import torch, vit_fast\n"
        "model = vit_fast.VisionTransformer(vit_fast.CONFIGS['testing'], img_size=32, num_classes=2).eval()\n"
        "print(model(torch.zeros(1, 3, 32, 32))[0].shape, vit_fast.backends()['triton'])\n"
    )
    result = run(code, path=[ROOT])
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([1, 2]) triton is not installed\n"


def test_import_time():
    """At most 0.3 s on top of torch; the best of three, since machines are noisy."""
    code = "import torch, time; t = time.perf_counter(); import vit_fast; print(time.perf_counter() - t)"
    assert min(float(run(code, path=[ROOT]).stdout) for _ in range(3)) < 0.3


def test_versions_agree():
    import importlib.metadata

    import vit_fast

    assert importlib.metadata.version("vit_fast") == vit_fast.__version__
