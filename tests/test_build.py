"""Building the extension: what VIT_FAST_EXT asks for, what is missing, wheels for every Python, objects for every torch."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vit_fast import extension

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests")]

import build_extension as build  # noqa: E402
import build_variant  # noqa: E402

pytestmark = pytest.mark.skipif(extension.missing("cpu") is not None, reason=str(extension.missing("cpu")))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def environment(monkeypatch):
    for name in ("VIT_FAST_EXT", "CXX", "CUDA_HOME", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# ---- The plan -------------------------------------------------------------------------------------------------------


def test_modes(environment, tmp_path):
    environment.setenv("CUDA_HOME", str(tmp_path))  # no nvcc there
    assert build.make_plan().devices == ("cpu",)
    environment.setenv("VIT_FAST_EXT", "off")
    assert build.make_plan().says() == "vit_fast: no extension"
    environment.setenv("VIT_FAST_EXT", "cpu")
    assert build.make_plan().says() == "vit_fast: extension for cpu"
    environment.setenv("VIT_FAST_EXT", "cuda")
    with pytest.raises(SystemExit, match=f"^vit_fast: VIT_FAST_EXT=cuda, but no nvcc in CUDA_HOME={tmp_path}$"):
        build.make_plan()
    environment.setenv("VIT_FAST_EXT", "gpu")
    with pytest.raises(SystemExit, match="VIT_FAST_EXT must be one of auto, off, cpu, cuda, got 'gpu'"):
        build.make_plan()


def test_no_compiler(environment):
    environment.setenv("CXX", "no-such-compiler")
    assert build.make_plan().says() == "vit_fast: no extension; not for cpu: no C++ compiler: no-such-compiler not found"
    environment.setenv("VIT_FAST_EXT", "cpu")
    with pytest.raises(SystemExit, match="VIT_FAST_EXT=cpu, but no C.. compiler"):
        build.make_plan()


def test_old_compiler(environment, tmp_path):
    environment.setenv("CXX", str(program(tmp_path / "g++-9", "echo unrecognized command line option >&2; exit 1")))
    assert "g++-9 can't compile C++20 with vector types (GCC 12 or Clang 15 can)" in build.make_plan().says()


def test_nvcc_without_headers(environment, tmp_path, monkeypatch):
    program(tmp_path / "bin/nvcc", "exit 0")
    environment.setenv("CUDA_HOME", str(tmp_path))
    torch_folder = build.find_torch()
    monkeypatch.setattr(build, "find_torch", lambda: torch_folder)
    monkeypatch.setattr(build, "_site_packages", lambda: [])
    plan = build.make_plan()
    assert plan.devices == ("cpu",) and "cublasLt.h is not" in plan.says()
    environment.setenv("VIT_FAST_EXT", "cuda")
    with pytest.raises(SystemExit, match="VIT_FAST_EXT=cuda, but nvcc is here but cublasLt.h is not"):
        build.make_plan()


def test_what_an_isolated_build_fetches(environment, monkeypatch):
    assert build.get_requires_for_build_wheel() == []  # torch is installed
    monkeypatch.setattr(build, "_site_packages", lambda: [])
    assert build.get_requires_for_build_wheel() == build.get_requires_for_build_editable() == ["torch>=2.11"]
    environment.setenv("VIT_FAST_EXT", "off")
    assert build.get_requires_for_build_wheel() == []


# ---- Wheels ---------------------------------------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("vit_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def pip_wheel(folder: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """The wheel of a copy of the sources, and what pip printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", str(folder / "dist"), "."]
    environment = {k: v for k, v in os.environ.items() if k not in ("VIT_FAST_EXT", "CXX", "CUDA_HOME")} | variables
    result = subprocess.run(command, cwd=checkout(folder), env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel, result.stdout + result.stderr


CALL = """
import torch, vit_fast
from vit_fast import extension
print(vit_fast.__file__)
print(vit_fast.backends()["cpp"], extension.missing("cuda"))
with vit_fast.use("cpp"):
    print(vit_fast.ops.layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2)).tolist())
"""


def call(folder: Path, code: str = CALL, **variables: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + code
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIT_FAST_IMPL")} | variables
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=120)


def test_isolated_wheel(tmp_path):
    """Built in isolation, against the installed torch's headers; one object for every Python, and a result out of it."""
    wheel, _ = pip_wheel(tmp_path, VIT_FAST_EXT="cpu", CXXFLAGS="-O1")
    assert wheel.name.split("-", 2)[2].startswith("py3-none-") and "any" not in wheel.name
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    [line] = [line for line in (next(site.glob("*.dist-info")) / "WHEEL").read_text().splitlines() if line.startswith("Root")]
    assert line == "Root-Is-Purelib: false"
    assert [p.name for p in site.rglob("*.so")] == ["libvit_fast_cpu.so"]
    command = ["readelf", "-d", str(site / "vit_fast/libvit_fast_cpu.so")]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed and "libc10" in needed and "libpython" not in needed
    result = call(site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == str(site / "vit_fast/__init__.py")
    assert result.stdout.splitlines()[2].startswith("[[-0.99999")


def test_auto_without_a_compiler_still_installs(tmp_path):
    wheel, printed = pip_wheel(tmp_path, "--no-build-isolation", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert printed.count("vit_fast: no extension; not for cpu: no C++ compiler: no-such-compiler not found") >= 1


def test_source_distribution(tmp_path):
    """It holds what the extension is built from."""
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=checkout(tmp_path), env={**os.environ, "VIT_FAST_EXT": "off"}, check=True, timeout=120)
    [path] = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.*")}
    assert len(sources) > 20 and sources | {"setup.py", "pyproject.toml", "kernels/common.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_asked_for_by_name_fails_clearly(tmp_path):
    environment = {**os.environ, "VIT_FAST_EXT": "cpu", "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=checkout(tmp_path), env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "vit_fast: VIT_FAST_EXT=cpu, but no C++ compiler: no-such-compiler not found"


# ---- Objects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, reason", [(None, "is not built"), (b"not an object", "does not load: .*file too short")])
def test_a_missing_or_broken_object_is_a_reason(content, reason, tmp_path):
    """vit_fast imports and computes without it; who asks by name is told."""
    checkout(tmp_path)
    if content is not None:
        (tmp_path / "vit_fast/libvit_fast_cpu.so").write_bytes(content)
    result = call(tmp_path)
    assert result.returncode == 1
    told = f"RuntimeError: layer_norm: implementation 'cpp' cannot run: the extension .*{reason}"
    assert re.search(told, result.stderr.splitlines()[-1])
    result = call(tmp_path, "from vit_fast.cli import main; raise SystemExit(main(['info']))")
    assert result.returncode == 0 and re.search(f"cpp .*no: the extension .*{reason}", result.stdout)


def other_pythons() -> list[str]:
    """Pythons of the virtual environments in the checkout whose torch is not this one's."""
    import torch

    found = []
    for python in sorted(ROOT.glob(".venv*/bin/python")):
        version = subprocess.run([str(python), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
        if version.returncode == 0 and version.stdout.split("+")[0].strip() != torch.__version__.split("+")[0]:
            found.append(str(python))
    return found


def test_one_build_serves_every_torch():
    """The object of this checkout, built once, under the other torch that is installed beside it."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no virtual environment with another torch in this checkout: .ci/run makes both")
    for python in pythons:
        code = "import sys; sys.path.insert(0, " + repr(str(ROOT)) + ")\n" + CALL
        result = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1].startswith("None ") and result.stdout.splitlines()[2].startswith("[[-0.99999")


def test_lanes_of_avx512(tmp_path):
    """The 16-lane code, compiled for AVX2, in every one of the kernels' tests; results that nobody wrote would show."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    if not build._is_x86() or " avx2 " not in flags:
        pytest.skip("the lanes are compiled for AVX2, which this processor lacks")
    if " avx512f " in flags:
        pytest.skip("this processor has AVX-512: the kernels' tests ran on it")
    command = [sys.executable, str(Path(build_variant.__file__)), "lanes", "-k", "avx512", "-n", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "avx512" not in result.stdout.rpartition("SKIPPED")[2]
