"""Runs the extension's tests on another build of it, in a copy of the package.

``python tests/build_variant.py lanes|sanitize [pytest's arguments]``

``lanes``     the code for AVX-512's 16 lanes, compiled for AVX2: its logic runs on processors without AVX-512. Fresh memory is
              filled with a pattern, so that a result nobody wrote shows.
``sanitize``  everything under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

import build_extension as build  # noqa: E402

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"


def run(variant: str, folder: Path, *pytest_arguments: str) -> int:
    """Build the variant and test it in the folder; pytest's exit code. CannotBuild where there is no compiler."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"}
    if variant == "lanes":
        build.X86_SETS["avx512"] = "-mavx2 -mfma -DVIT_FAST_LANES=16"
        os.environ["CXXFLAGS"] = "-O1 -DVIT_FAST_AVX512_RUNS"
        environment["MALLOC_PERTURB_"] = "1"
    elif variant == "sanitize":
        os.environ["CXXFLAGS"] = os.environ["LDFLAGS"] = SANITIZE
        compiler = build.find_compiler()
        preloaded = (
            subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        )
        # Leaks are the interpreter's; nothing of ours allocates but through torch.
        environment |= {"LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=268435456"}
    else:
        raise SystemExit(__doc__)
    for name in ("vit_fast", "kernels", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    plan = build.Plan("cpu", build.find_compiler(), build.find_ninja(), build.find_torch())
    build.build_object(plan, "cpu", folder / "vit_fast" / "libvit_fast_cpu.so", folder / "build")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_extension.py", *pytest_arguments]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        raise SystemExit(run(sys.argv[1], Path(name), *sys.argv[2:]))
