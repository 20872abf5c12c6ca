"""The package map and the extension; everything else that describes the project stands in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))

from build_extension import extension_arguments  # noqa: E402

version = re.search(r'^__version__ = "(.+)"', (HERE / "vit_fast" / "__init__.py").read_text(), re.M)[1]

setup(
    version=version,
    packages=[
        "vit_fast",
        "vit_fast.benchmarks",
        "vit_fast.frozen",
        "vit_fast.frozen.families",
        "vit_fast.ops",
        "vit_fast.train",
        "vit_fast.kernels",
    ],
    # The kernels lie at the top of the repository and are installed inside the package: see vit_fast/kernels.py.
    package_dir={"vit_fast": "vit_fast", "vit_fast.kernels": "kernels"},
    package_data={"vit_fast": ["tables/*.json", "weights/*"], "vit_fast.kernels": ["README.md"]},
    **extension_arguments(),
)
