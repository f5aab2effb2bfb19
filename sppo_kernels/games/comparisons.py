"""Tables of pairwise comparisons: loading them, and pooling them into win rates."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sppo_kernels import checks
from sppo_kernels.backend import resolve
from sppo_kernels.games import reference
from sppo_kernels.games.inputs import as_tensor
from sppo_kernels.registry import define, fake, op
from sppo_kernels.results import Aggregate, Comparisons

_OUTCOMES = {"left": 1.0, "right": 0.0, "tie": 0.5, "a": 1.0, "b": 0.0, "draw": 0.5}

define("game_group", "(Tensor game, int games) -> (Tensor, Tensor)")
define(
    "game_aggregate",
    "(Tensor i, Tensor j, Tensor outcome, Tensor? weight, Tensor indptr, Tensor? order, int k, "
    "bool wide) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@fake("game_group")
def _(game, games):
    return game.new_empty(games + 1), game.new_empty(game.shape)


@fake("game_aggregate")
def _(i, j, outcome, weight, indptr, order, k, wide):
    games, dtype = indptr.shape[0] - 1, torch.float64 if wide else torch.float32
    shapes = ((games, k, k),) * 2 + ((games, k),) * 3
    return tuple(outcome.new_empty(shape, dtype=dtype) for shape in shapes)


def load_comparisons(
    source: Any,
    *,
    game: str | None = "prompt",
    left: str = "model_x",
    right: str = "model_y",
    winner: str = "winner",
    weight: str | None = None,
    outcomes: Mapping[str, float] | None = None,
) -> Comparisons:
    """Reads a table with one judgement a row.

    Args:
        source: path of a CSV file with a header, a pandas DataFrame, or a mapping of columns.
        game: column that tells games apart; None when all rows belong to one game.
        left, right: columns naming the two responses.
        winner: column with "left", "right" or "tie" (any case; also "a", "b", "draw"), or a number:
            the share of the win that went to the left one.
        weight: column of weights; None when every row weighs 1.
        outcomes: further words of the winner column and their share for the left response.

    Returns:
        Comparisons; games and responses are numbered in order of first appearance.

    Raises:
        ValueError: a column that is missing, columns of different lengths, or an unknown outcome
            (with its row).
    """
    names = [name for name in (game, left, right, winner, weight) if name is not None]
    columns = _columns(source, names)
    words = {**_OUTCOMES, **{k.lower(): v for k, v in (outcomes or {}).items()}}
    known: dict[Any, tuple[int, dict[Any, int]]] = {}  # a game's number and those of its responses
    index = []
    of_row = columns[game] if game is not None else itertools.repeat(0)
    for name, *pair in zip(of_row, columns[left], columns[right], strict=False):
        number, ids = known.setdefault(name, (len(known), {}))
        index.append([number, *(ids.setdefault(response, len(ids)) for response in pair)])
    shares = [_share(value, words, winner, row) for row, value in enumerate(columns[winner])]
    weights = None
    if weight is not None:
        weights = torch.tensor([float(w) for w in columns[weight]], dtype=torch.float64)
    of, i, j = torch.tensor(index, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    responses = [list(ids) for _, ids in known.values()]
    return Comparisons(
        game=of,
        i=i,
        j=j,
        outcome=torch.tensor(shares, dtype=torch.float64),
        weight=weights,
        lengths=torch.tensor([len(names) for names in responses], dtype=torch.int64),
        games=list(known),
        responses=responses,
    )


def _columns(source: Any, names: list[str]) -> dict[str, list]:
    if isinstance(source, (str, os.PathLike)):
        with open(source, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        source = {name: [row[name] for row in rows] for name in reader.fieldnames or ()}
    missing = [name for name in names if name not in source]
    if missing:
        raise ValueError(
            f"source: expected columns {names}, {missing} missing from {list(source.keys())}"
        )
    table = {name: list(source[name]) for name in names}
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"source: expected columns of one length, got {lengths}")
    return table


def _share(value: Any, words: Mapping[str, float], column: str, row: int) -> float:
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{column}: expected one of {sorted(words)} or a number, got {value!r} in row {row}"
        ) from None


def aggregate(
    i: Any,
    j: Any = None,
    outcome: Any = None,
    *,
    game: Any = None,
    indptr: Any = None,
    weight: Any = None,
    lengths: Any = None,
    num_games: int | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Aggregate:
    """Pools weighted comparisons into pairwise probabilities and win rates.

    Sums are taken in float64, in the order of the input, so equal input gives equal bits.

    Args:
        i, j: [N] integers, the two responses of each comparison, numbered within their game; or `i`
            may be a `Comparisons` table, which then stands for all columns.
        outcome: [N], share of the win that went to i: 1, 1/2 (tie), 0 or a probability.
        game: [N] integers, the game of each comparison, in any order.
        indptr: [G+1] integers instead of `game`: comparisons of game g are indptr[g]..indptr[g+1].
            With neither, all comparisons belong to one game.
        weight: [N], at least 0; None when every comparison weighs 1. Weight 0 is no comparison.
        lengths: [G] integers, responses of each game; indices at or past it are refused.
        num_games: number of games; default the largest index + 1 (or the size of `lengths`).
        size: K of the result; default the largest index + 1 (or the largest length).
        dtype: float32 or float64 of the result; default that of `outcome`, else torch's default.
        impl: "auto", "native" or "reference".

    Returns:
        Aggregate(P [G, K, K], counts [G, K, K], win_rate [G, K], win_rate_micro [G, K],
        count [G, K]).

    Raises:
        ValueError: columns of different lengths, indices out of range, a response compared with
            itself, outcomes outside [0, 1], negative or non-finite weights, fewer than 2 responses.
        TypeError: indices that are not integers.
    """
    if isinstance(i, Comparisons):
        if any(value is not None for value in (j, outcome, game, indptr, weight, lengths)):
            raise ValueError("i: a Comparisons table already holds all columns")
        game, i, j, outcome, weight, lengths = i[:6]
    if game is not None and indptr is not None:
        raise ValueError("indptr: give either game or indptr, not both")
    columns = {"i": i, "j": j, "outcome": outcome}
    columns |= {k: v for k, v in (("game", game), ("weight", weight)) if v is not None}
    columns = {name: _column(value, name) for name, value in columns.items()}
    i, j, outcome, weight = (columns.get(name) for name in ("i", "j", "outcome", "weight"))
    total = i.numel()
    for name, column in columns.items():
        if column.numel() != total:
            raise ValueError(f"{name}: expected {total} entries, like i, got {column.numel()}")
    if dtype is None:
        given = outcome.dtype
        dtype = given if given.is_floating_point else torch.get_default_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")

    outcome = outcome.double().contiguous()
    weight = None if weight is None else weight.double().contiguous()
    lengths = None if lengths is None else _column(lengths, "lengths").to(i.device)
    game, indptr, games = _game_index(columns.get("game"), indptr, lengths, num_games, i)
    if size is None and lengths is not None and lengths.numel():
        size = int(lengths.max())
    elif size is None:
        size = int(torch.maximum(i.max(), j.max())) + 1 if total else 0
    if size < 2:
        raise ValueError(f"size: a game needs K >= 2 responses, got K = {size}")
    if lengths is not None and lengths.numel() != games:
        raise ValueError(f"lengths: expected {games} entries, one a game, got {lengths.numel()}")
    if checks.can_read(i) and total:
        _check_values(i, j, outcome, weight, game, games, lengths, size)
    if resolve(impl, i.device.type, None, games=True) == "reference":
        found = reference.aggregate(i, j, outcome, weight, game, games, size)
        return Aggregate(*(t.to(dtype) for t in found))
    order = None
    if indptr is None:
        indptr, order = _group(game, games)
    wide = dtype == torch.float64
    return Aggregate(*op("game_aggregate")(i, j, outcome, weight, indptr, order, size, wide))


def _group(game: Tensor, games: int) -> tuple[Tensor, Tensor]:
    """Offsets of each game [G+1] and a stable order of the comparisons [N]."""
    if game.device.type == "cpu":
        return op("game_group")(game, games)
    ordered, order = torch.sort(game, stable=True)
    return torch.searchsorted(ordered, torch.arange(games + 1, device=game.device)), order


def _column(value: Any, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: expected one entry a comparison, got None")
    column = as_tensor(value, name)
    if column.dim() != 1:
        raise ValueError(f"{name}: expected shape [N], got {list(column.shape)}")
    if name in ("outcome", "weight"):
        return column
    if column.numel() and (column.is_floating_point() or column.dtype == torch.bool):
        raise TypeError(f"{name}: expected integers, got {column.dtype}")
    return column.to(torch.int64).contiguous()


def _game_index(
    game: Tensor | None,
    indptr: Any,
    lengths: Tensor | None,
    num_games: int | None,
    i: Tensor,
) -> tuple[Tensor, Tensor | None, int]:
    """Game of each comparison, offsets if the input is in game order, and the number of games."""
    total = i.numel()
    if game is not None:
        default = int(game.max()) + 1 if total else 0
        known = lengths.numel() if lengths is not None else default
        return game, None, known if num_games is None else num_games
    if indptr is None:
        indptr = torch.tensor([0, total], device=i.device)
    indptr = _column(indptr, "indptr").to(i.device)
    steps = indptr.diff()
    if indptr.numel() < 1 or (
        checks.can_read(indptr)
        and (int(indptr[0]) != 0 or int(indptr[-1]) != total or bool((steps < 0).any()))
    ):
        raise ValueError(f"indptr: expected offsets that grow from 0 to N = {total}")
    games = indptr.numel() - 1
    if num_games not in (None, games):
        raise ValueError(f"num_games: indptr describes {games} games, got {num_games}")
    of = torch.repeat_interleave(torch.arange(games, device=i.device), steps, output_size=total)
    return of, indptr, games


def _check_values(
    i: Tensor, j: Tensor, outcome: Tensor, weight: Tensor | None, game: Tensor, games: int,
    lengths: Tensor | None, size: int,
) -> None:  # fmt: skip
    _in_range(game, "game", games, game)
    if lengths is not None and (int(lengths.max()) > size or int(lengths.min()) < 2):
        raise ValueError(f"lengths: expected 2 <= length <= K = {size}, got {lengths.tolist()}")
    limit = size if lengths is None else lengths[game]
    _in_range(i, "i", limit, game)
    _in_range(j, "j", limit, game)
    if bool((i == j).any()):
        at = int((i == j).int().argmax())
        raise ValueError(f"j: response {int(j[at])} is compared with itself in comparison {at}")
    if not _within(outcome, 0, 1):
        checks.win_rates(outcome, "outcome")
    if weight is not None and not _within(weight, 0, torch.finfo(weight.dtype).max):
        checks.weights(weight, "weight")


def _within(column: Tensor, low: float, high: float) -> bool:
    """Whether all values lie in [low, high]; NaN does not. One pass, no temporaries."""
    least, most = torch.aminmax(column)
    return bool(least >= low) and bool(most <= high)


def _in_range(index: Tensor, name: str, limit: int | Tensor, game: Tensor) -> None:
    if isinstance(limit, int) and _within(index, 0, limit - 1):
        return
    good = (index >= 0) & (index < limit)
    if not bool(good.all()):
        at = int((~good).int().argmax())
        most = limit if isinstance(limit, int) else int(limit[at])
        raise ValueError(
            f"{name}: expected indices in [0, {most}), got {int(index[at])} in comparison {at}, "
            f"game {int(game[at])}"
        )
