"""The one checked call of the games: a batch, its lengths and the implementation that plays it.

Operators are C++ (csrc/cpu/game.cpp, csrc/cuda/game.cpp) and appear when the extension is loaded;
`declare` gives them their schema and fake, and games/reference/ has a function of each one's name
that takes the same arguments: the specification.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sppo_kernels.backend import resolve
from sppo_kernels.checks import can_read
from sppo_kernels.games import reference
from sppo_kernels.registry import define, fake, op

GAP_WARNING = 1e-2  # judges round to two digits; more than that is a bias, not rounding


def declare(name: str, arguments: str, *results: tuple[str, torch.dtype | None]) -> None:
    """Operator `game_<name>` of x [G, K, K] and `arguments`.

    Each result is its dimensions, of "G" and "K", and its dtype, None for that of x.
    """
    returns = ", ".join(["Tensor"] * len(results))
    define(f"game_{name}", f"(Tensor x, {arguments}) -> ({returns})")

    def without_values(x: Tensor, *_: Any) -> Any:
        size = dict(zip("GK", x.shape[:2], strict=True))
        found = [
            x.new_empty([size[d] for d in dimensions], dtype=dtype) for dimensions, dtype in results
        ]
        return tuple(found) if len(found) > 1 else found[0]

    fake(f"game_{name}")(without_values)


def implementation(name: str, impl: str) -> Callable:
    """What computes `name` under a resolved `impl`: the operator, or the reference's function."""
    return op(f"game_{name}") if impl == "native" else getattr(reference, name)


class Games(NamedTuple):
    """A checked batch with its leading dimensions flattened.

    Attributes:
        x: [G, K, K] contiguous float32 or float64.
        lengths: [G] int64 or None.
        batch: the leading dimensions of the input.
        impl: "native" or "reference".
    """

    x: Tensor
    lengths: Tensor | None
    batch: torch.Size
    impl: str

    def run(self, name: str, *arguments: Any) -> Any:
        """Operator `name` of x and `arguments`; results [G, ...] as [*batch, ...]."""
        found = implementation(name, self.impl)(self.x, *arguments)
        if isinstance(found, Tensor):
            return self.restore(found)
        return tuple(self.restore(t) for t in found)

    def restore(self, t: Tensor) -> Tensor:
        return t.reshape(self.batch + t.shape[1:])

    def place(self, flat: int) -> list[int]:
        """Index in the input of an entry of x."""
        k = self.x.shape[-1]
        game, entry = divmod(flat, k * k)
        index = [entry // k, entry % k]
        for size in reversed(self.batch):
            game, at = divmod(game, size)
            index.insert(0, at)
        return index


def as_tensor(value: Any, name: str) -> Tensor:
    """`value` (tensor, array, nested list) as a tensor; TypeError when it is none of these."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor, an array or nested lists of numbers, "
            f"got {type(value).__name__} ({error})"
        ) from error


def as_games(
    value: Any, name: str, lengths: Any, impl: str, *, logits: bool = False, want_gap: bool = True
) -> Games:
    """Games of `value` [..., K, K], checked; a call that was checked before passes as it is.

    Args:
        value: tensor, array or nested list; dtypes other than float32 and float64 become float32.
        name: of the argument, for messages.
        lengths: [...] integers from 2 to K, or None.
        impl: "auto", "native" or "reference".
        logits: whether values may be any finite number, and not only probabilities.
        want_gap: whether to warn where P_ij + P_ji is far from 1.

    Values are read on the CPU, on other devices under SPPO_KERNELS_CHECK=1 (it synchronises), and
    never under torch.compile. The diagonal is never read.
    """
    if isinstance(value, Games):
        return value
    x = as_tensor(value, name)
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name}: expected shape [..., K, K], got {list(x.shape)}")
    if x.shape[-1] < 2:
        raise ValueError(f"{name}: a game needs K >= 2 responses, got K = {x.shape[-1]}")
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.float32 if x.is_floating_point() else torch.get_default_dtype())
    batch, k = x.shape[:-2], x.shape[-1]
    if lengths is not None:
        lengths = _as_lengths(lengths, batch, k).to(x.device).reshape(-1).contiguous()
    chosen = resolve(impl, x.device.type, None, games=True)
    games = Games(x.reshape(-1, k, k).contiguous(), lengths, batch, chosen)
    if can_read(games.x):
        _check_values(games, name, logits, want_gap)
    return games


def _as_lengths(value: Any, batch: torch.Size, k: int) -> Tensor:
    lengths = as_tensor(value, "lengths")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != batch:
        raise ValueError(
            f"lengths: expected shape {list(batch)}, one a game, got {list(lengths.shape)}"
        )
    if can_read(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 2 or high > k:
            raise ValueError(
                f"lengths: expected 2 <= length <= K = {k}, got {low if low < 2 else high}"
            )
    return lengths.to(torch.int64)


def _check_values(games: Games, name: str, logits: bool, want_gap: bool) -> None:
    x = games.x.detach()
    check = implementation("check", games.impl if x.device.type == "cpu" else "reference")
    high = torch.finfo(x.dtype).max if logits else 1.0
    bad, gap, at = check(x, games.lengths, -high if logits else 0.0, high, want_gap).tolist()
    if bad >= 0:
        value = float(x.reshape(-1)[int(bad)])
        wanted = "finite logits" if logits else "probabilities in [0, 1]"
        raise ValueError(f"{name}: expected {wanted}, got {value} at {games.place(int(bad))}")
    if want_gap and gap > GAP_WARNING:
        warnings.warn(
            f"{name}: P_ij + P_ji should be 1, and differs from it by up to {gap:.3g}, "
            f"at {games.place(int(at))}; symmetrize it first to remove position bias",
            UserWarning,
            stacklevel=4,
        )


# game_check is no result [G, ...]: the flat index of the first bad entry or -1, the largest
# |P_ij + P_ji - 1| and its flat index
define("game_check", "(Tensor x, Tensor? lengths, float low, float high, bool want_gap) -> Tensor")


@fake("game_check")
def _(x, lengths, low, high, want_gap):
    return x.new_empty(3, dtype=torch.float64)
