"""What holds of every family, whether its package is there or not."""

import subprocess
import sys

import family_support as support
import pytest
from torch import nn

from vit_fast.frozen import families
from vit_fast.frozen.description import Unsupported


def test_no_package_is_imported_by_the_adapters():
    code = f"""
import sys
from vit_fast.frozen import families
for name in {families.NAMES}:
    families.by_name(name)
sys.exit(", ".join({{"timm", "transformers", "torchvision"}} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_of_nobodys_is_refused():
    with pytest.raises(Unsupported, match="freeze: torch.nn.modules.linear.Linear is not a model that it can read"):
        families.family_of(nn.Linear(2, 2))


def test_a_family_that_is_required_is_never_skipped(monkeypatch):
    with pytest.raises(pytest.skip.Exception, match="no_such_package can't be imported here"):
        support.package("no_such_package")
    monkeypatch.setattr(support, "REQUIRED", ["no_such_package"])
    with pytest.raises(ModuleNotFoundError):
        support.package("no_such_package")
