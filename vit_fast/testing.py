"""The error budget, and inputs to test and time with. Shared by ``tests/``, ``bench/`` and ``vit-fast verify``."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Error:
    """How far a result is from the exact one, beside what it may be. All three are absolute, in the result's own unit."""

    value: float  # max |actual - exact|
    reference: float  # max |reference - exact|, the reference computed in the same dtype
    budget: float  # 2 · reference + one rounding step

    @property
    def ok(self) -> bool:
        return self.value <= self.budget  # False for NaN


def error(actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype | None = None) -> Error:
    r"""The error of ``actual`` against the budget of the project.

    .. math:: \max|actual - exact| \le 2 \max|reference - exact| + \varepsilon(dtype) \max|exact|

    :param actual: what an implementation gave.
    :param reference: what the reference gave for the same inputs in the same dtype.
    :param exact: what the reference gives in float64. Same shape as the other two.
    :param dtype: whose rounding step is granted: ``actual.dtype`` unless given (under autocast: the lower one).

    Where ``exact`` is not finite, ``actual`` must be the same there (NaN for NaN, the same infinity); elsewhere it must be
    finite. Anything else is an infinite error.
    """
    if not actual.shape == reference.shape == exact.shape:
        raise ValueError(f"error: shapes differ: {tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(exact.shape)}")
    if exact.dtype != torch.float64:
        raise ValueError(f"error: exact must be float64, got {exact.dtype}")
    step = torch.finfo(dtype or actual.dtype).eps
    actual, reference, exact = (t.detach().double().cpu() for t in (actual, reference, exact))
    finite = exact.isfinite()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    if not torch.equal(actual.isfinite(), finite) or not bool(same[~finite].all()):
        return Error(float("inf"), 0.0, 0.0)
    actual, reference, exact = actual[finite], reference[finite], exact[finite]
    if exact.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    of_reference = float((reference - exact).abs().max())
    if of_reference != of_reference or of_reference == float("inf"):
        of_reference = 0.0  # a reference that overflows where the exact result does not earns no leniency
    return Error(float((actual - exact).abs().max()), of_reference, 2 * of_reference + step * float(exact.abs().max()))


def assert_within_budget(actual, reference, exact, what: str = "result", dtype: torch.dtype | None = None) -> None:
    """AssertionError with the figures when ``actual`` breaks the budget; takes tensors, or equally long sequences of them."""
    if isinstance(actual, (tuple, list)):
        assert len(actual) == len(reference) == len(exact), f"{what}: {len(actual)}, {len(reference)}, {len(exact)} tensors"
        for i, triple in enumerate(zip(actual, reference, exact, strict=True)):
            assert_within_budget(*triple, what=f"{what}[{i}]", dtype=dtype)
        return
    e = error(actual, reference, exact, dtype)
    assert e.ok, f"{what}: error {e.value:.3e} is over the budget {e.budget:.3e} (the reference's own error: {e.reference:.3e})"


def randn(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0, scale: float = 1.0, requires_grad: bool = False):
    """Normal random values, the same on every device: drawn on the CPU in float32, scaled, then cast and moved."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)


def with_gradients(function, tensors, cotangent_seed: int = 7) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Call ``function(*tensors)`` and differentiate Σ output·random by every floating tensor: ``(outputs, gradients)``.

    ``tensors`` may hold None. The inputs are detached first, so repeated calls are independent; the random cotangents depend on
    the seed and the outputs' shapes alone, so implementations and dtypes can be compared.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, torch.Tensor) else t for t in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
    cotangents = [randn(*o.shape, dtype=o.dtype, device=o.device, seed=cotangent_seed + i) for i, o in enumerate(outputs)]
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    given = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    gradients = [next(given) if isinstance(t, torch.Tensor) and t.requires_grad else None for t in leaves]
    return [o.detach() for o in outputs], gradients
