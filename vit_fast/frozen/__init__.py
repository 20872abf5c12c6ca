"""Frozen inference: ``fast = vit_fast.freeze(model)``, the fastest way to run a trained Vision Transformer, ours or anybody's.

=============  ========================================================================================
model          `freeze`, and `Frozen`, what it returns
description    a Vision Transformer described once: architecture, weights in one layout, the formula
families       whose models can be read, and how their outputs are wrapped
positions      each family's rule for resizing the position table
fold           what is constant, multiplied into the weights
products       weights in the layout of the product that multiplies by them
engine         the forward pass
graphs         CUDA graphs around it
check          the parity that `freeze` measures
files          saving and loading
=============  ========================================================================================
"""

from vit_fast.frozen.description import Unsupported
from vit_fast.frozen.model import Frozen, Report, freeze

__all__ = ["Frozen", "Report", "Unsupported", "freeze"]
