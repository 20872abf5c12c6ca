"""Every implementation of `linear`, forward and backward; the options are in conftest.py."""

OPERATION = "linear"


def test_linear(operation):
    operation()
