"""Fixtures of these tests."""

import google_files
import numpy as np
import pytest


@pytest.fixture
def arrays():
    return google_files.google_arrays()


@pytest.fixture
def npz(arrays, tmp_path):
    np.savez(tmp_path / "google.npz", **arrays)
    return tmp_path / "google.npz"
