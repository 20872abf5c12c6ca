"""Runs the extension's tests on another build of it, in a copy of the package.

``python tests/build_variant.py lanes|sanitize|emulated|emulated-sanitize [pytest's arguments]``

``lanes``     the code for AVX-512's 16 lanes, compiled for AVX2: its logic runs on processors without AVX-512. Fresh memory is
              filled with a pattern, so that a result nobody wrote shows.
``sanitize``  everything under AddressSanitizer and UndefinedBehaviorSanitizer.
``emulated``  the CUDA kernels and launchers in place of the CPU's, as C++ on stand-ins for CUDA and cuBLASLt (tests/emulated):
              their logic runs without a GPU. ``emulated-sanitize``: under the sanitizers, which see what is read outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests/emulated")]

import build_extension as build  # noqa: E402
from translate import translate  # noqa: E402

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
# A misaligned access ends the process, as it ends a kernel; variables that nobody set hold no zeros.
EMULATE = "-O1 -Wno-unknown-pragmas -Wno-sign-compare -ftrivial-auto-var-init=pattern"
TRAP = "-fsanitize=alignment -fsanitize-undefined-trap-on-error"


def build_emulated(compiler: list[str], torch: Path, target: Path, folder: Path) -> None:
    """The object of ``emulated``, by CXXFLAGS and LDFLAGS. CalledProcessError with the compiler's output shown."""
    stand_ins = ROOT / "tests/emulated"
    folder.mkdir()
    sources = [ROOT / "csrc/ops.cpp", stand_ins / "instruction_set.cpp"]
    for original in sorted((ROOT / "csrc").iterdir()):
        if original.suffix in (".cu", ".cuh", ".h"):
            text = original.read_text()
            copy = folder / original.name
            copy.write_text(text if original.suffix == ".h" else translate(text, original.name))
            sources += [copy] if original.suffix == ".cu" else []
    options = [f"-I{stand_ins}", *build.host_flags(torch)]

    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        subprocess.run([*compiler, *options, "-x", "c++", "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    link = ["-shared", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler, *link, *os.environ.get("LDFLAGS", "").split()], check=True)


def run(variant: str, folder: Path, *pytest_arguments: str) -> int:
    """Build the variant and test it in the folder; pytest's exit code. CannotBuild where there is no compiler."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
    tests = ["tests/test_extension.py", "tests/test_extension_out.py"]
    if variant == "lanes":
        build.X86_SETS["avx512"] = "-mavx2 -mfma -DVIT_FAST_LANES=16"
        os.environ["CXXFLAGS"] = "-O1 -DVIT_FAST_AVX512_RUNS"
        environment["MALLOC_PERTURB_"] = "1"
    elif variant in ("sanitize", "emulated-sanitize"):
        os.environ["CXXFLAGS"] = os.environ["LDFLAGS"] = SANITIZE
        compiler = build.find_compiler()
        preloaded = (
            subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        )
        # Leaks are the interpreter's; nothing of ours allocates but through torch.
        environment |= {"LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=268435456"}
    elif variant == "emulated":
        os.environ["CXXFLAGS"] = TRAP
    else:
        raise SystemExit(__doc__)
    for name in ("vit_fast", "kernels", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    plan = build.Plan("cpu", build.find_compiler(), build.find_ninja(), build.find_torch())
    target = folder / "vit_fast" / "libvit_fast_cpu.so"
    if variant.startswith("emulated"):
        os.environ["CXXFLAGS"] += f" {EMULATE}"
        environment |= {"VIT_FAST_EMULATED": "1", "OMP_NUM_THREADS": "1"}  # kernels run on one thread: others would only wait
        tests = ["tests/test_emulated.py"]
        assert plan.torch is not None
        build_emulated(plan.compiler, plan.torch, target, folder / "build")
    else:
        build.build_object(plan, "cpu", target, folder / "build")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *pytest_arguments]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        raise SystemExit(run(sys.argv[1], Path(name), *sys.argv[2:]))
