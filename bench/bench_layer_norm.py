"""Every implementation of `layer_norm`, forward and backward; the options are in conftest.py."""

OPERATION = "layer_norm"


def test_layer_norm(operation):
    operation()
