"""How results are judged, here and in code that extends the package.

Truth is the reference in float64 on the same (rounded) inputs. A fast implementation may be at most
twice as far from it as eager PyTorch in the same precision, plus one rounding of its output.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "poisoned_empty", "relative_error"]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; NaN anywhere gives NaN, and NaN passes no bound."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    if value.shape != truth.shape:
        raise AssertionError(f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}")
    scale = truth.norm().item()
    distance = (value - truth).norm().item()
    return distance / scale if scale > 0 else distance


def assert_within_budget(
    value: Tensor, eager: Tensor, truth: Tensor, *, what: str = "result", roundings: float = 1.0
) -> None:
    """Assert error(value) <= 2 error(eager) + `roundings` roundings of value's dtype."""
    error, allowed = relative_error(value, truth), 2.0 * relative_error(eager, truth)
    allowed += roundings * torch.finfo(value.dtype).eps
    if not error <= allowed:
        raise AssertionError(f"{what}: relative error {error:.3e}, allowed {allowed:.3e}")


class poisoned_empty:
    """Within this context, freshly allocated floating tensors hold NaN: what is not written shows.

    Covers torch.empty, torch.empty_like and Tensor.new_empty called from Python.
    """

    def __enter__(self) -> None:
        self._saved = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

        def poisoning(function):
            def allocate(*args, **kwargs):
                out = function(*args, **kwargs)
                return out.fill_(float("nan")) if out.is_floating_point() else out

            return allocate

        torch.empty, torch.empty_like = poisoning(torch.empty), poisoning(torch.empty_like)
        torch.Tensor.new_empty = poisoning(torch.Tensor.new_empty)

    def __exit__(self, *exc: object) -> None:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = self._saved
