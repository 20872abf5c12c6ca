"""Fixtures of these tests."""

import numpy as np
import pytest
from cli_support import tiny
from PIL import Image

from vit_fast import checkpoints
from vit_fast.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def weights(folder):
    return str(checkpoints.save(tiny(), folder / "tiny.safetensors"))


@pytest.fixture(scope="module")
def pictures(folder):
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(90, 60), (64, 64), (40, 75)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        paths.append(str(folder / f"picture{i}.png"))
        coarse.resize(size, Image.Resampling.BILINEAR).save(paths[-1])
    return paths


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return call


@pytest.fixture
def refused(run):
    """Calls main and returns the one line on stderr that it must end in."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and err.startswith("vit-fast: ") and err.count("\n") == 1, (code, err)
        assert out == ""
        return err

    return call
