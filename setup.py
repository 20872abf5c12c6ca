"""The package map; everything else that describes the project stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

version = re.search(r'^__version__ = "(.+)"', Path(__file__).with_name("vit_fast").joinpath("__init__.py").read_text(), re.M)[1]

setup(
    version=version,
    packages=["vit_fast", "vit_fast.ops", "vit_fast.kernels"],
    # The kernels lie at the top of the repository and are installed inside the package: see vit_fast/kernels.py.
    package_dir={"vit_fast": "vit_fast", "vit_fast.kernels": "kernels"},
    package_data={"vit_fast.kernels": ["README.md"]},
)
