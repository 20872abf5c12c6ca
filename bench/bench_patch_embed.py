"""Every implementation of `patch_embed`, forward and backward; the options are in conftest.py."""

OPERATION = "patch_embed"


def test_patch_embed(operation):
    operation()
