"""A frozen model's call where torch.compile traces it: one opaque call.

Importing this imports the compiler, which takes a second.
"""

import torch

call = torch.compiler.disable(
    lambda frozen, *args, **kwargs: frozen.call(*args, **kwargs),
    reason="a frozen model is compiled as far as it gets: the compiler sees one opaque call",
)
