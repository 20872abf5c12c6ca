"""Every implementation of `attention`, forward and backward; the options are in conftest.py."""

OPERATION = "attention"


def test_attention(operation):
    operation()
