"""How results are judged, here and in code that extends the package.

Truth is the reference in float64 on the same (rounded) inputs. A fast implementation may be at most
twice as far from it as eager PyTorch in the same precision, plus one rounding of its output and one
of the magnitudes that it is a difference of, where the test states them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_within_budget", "poisoned_empty", "relative_error", "sensitivity"]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; NaN anywhere gives NaN, and NaN passes no bound."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    if value.shape != truth.shape:
        raise AssertionError(f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}")
    scale = truth.norm().item()
    distance = (value - truth).norm().item()
    return distance / scale if scale > 0 else distance


def assert_within_budget(
    value: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    what: str = "result",
    roundings: float = 1.0,
    size: Tensor | float | None = None,
    computed_in: torch.dtype | None = None,
    elementwise: bool = False,
) -> None:
    """Assert |value − truth| <= 2 |eager − truth| + `roundings` roundings of value's dtype + floor.

    The floor is one rounding of `size`: of the magnitudes that the result is a sum or difference
    of, such as the largest |logit| of a log-prob. A result near zero carries their rounding
    whatever the implementation, and eager PyTorch may be exact there by luck. State what the
    computation cannot do without, not what one implementation happens to do.

    Args:
        value: What is judged.
        eager: Eager PyTorch in the same precision on the same inputs.
        truth: The reference in float64 on the same inputs.
        what: Its name in the message.
        roundings: How often the result is rounded in value's dtype, relative to its own size.
        size: A number, or a tensor that broadcasts to the result; absolute. None: no floor beyond
            the rounding of the result's own size.
        computed_in: The precision that `size` is rounded in; None: float32, or float64 if that is
            value's dtype.
        elementwise: Judge every element, not the norm over all: by eager's largest error, and for
            16-bit values by roundings of that element. `eager` is then not yet rounded to 16 bits.
    """
    if truth.dtype != torch.float64:
        raise AssertionError(f"{what}: truth is float64, got {truth.dtype}")
    if not value.shape == eager.shape == truth.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (value, eager, truth))
        raise AssertionError(f"{what}: shapes differ: {shapes}")
    info = torch.finfo(value.dtype)
    if elementwise and info.bits == 16 and eager.dtype == value.dtype:
        raise AssertionError(f"{what}: eager is taken before its rounding to {value.dtype}")
    floor = torch.as_tensor(0.0 if size is None else size, dtype=torch.float64).detach().cpu()
    computed_in = computed_in or torch.promote_types(value.dtype, torch.float32)
    floor = (torch.finfo(computed_in).eps * floor).expand(truth.shape)
    truth = truth.detach().cpu()
    error, theirs = ((x.detach().double().cpu() - truth).abs() for x in (value, eager))
    if elementwise and truth.numel():
        scale = truth.abs() if info.bits == 16 else truth.abs().max()
        allowed = 2.0 * theirs.max() + roundings * info.eps * scale + info.smallest_normal + floor
        at = int((error - allowed).nan_to_num(nan=float("inf")).argmax())
        error, allowed = error.flatten()[at], allowed.expand(truth.shape).flatten()[at]
        what, scale = f"{what} at {at}", truth.abs().max()
    else:
        error, scale = error.norm(), truth.norm()
        allowed = 2.0 * theirs.norm() + roundings * info.eps * scale + floor.norm()
    if not error <= allowed:  # NaN passes no bound
        unit = scale.item() or 1.0
        raise AssertionError(
            f"{what}: relative error {error.item() / unit:.3e}, allowed {allowed.item() / unit:.3e}"
        )


def sensitivity(result: Tensor, operand: Tensor) -> Tensor:
    """Σ |∂result/∂x · x| over the rows x of `operand`: what one rounding of each x does at most.

    A `size` for results of one row each, such as the log-probs of rows of logits.
    """
    (slope,) = torch.autograd.grad(result.sum(), operand, retain_graph=True)
    return (slope * operand).abs().sum(-1).detach()


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
