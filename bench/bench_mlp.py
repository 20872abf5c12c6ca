"""Every implementation of `mlp`, forward and backward; the options are in conftest.py."""

OPERATION = "mlp"


def test_mlp(operation):
    operation()
