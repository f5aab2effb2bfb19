"""Tables of pairwise comparisons: loading them, and pooling them into win rates."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sppo_kernels.games.inputs import as_tensor, is_native, reads_values
from sppo_kernels.results import Aggregate, Comparisons

_OUTCOMES = {"left": 1.0, "right": 0.0, "tie": 0.5, "a": 1.0, "b": 0.0, "draw": 0.5}


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
    total = len(columns[left])
    games: dict[Any, int] = {}
    known: list[dict[Any, int]] = []
    index: tuple[list[int], list[int], list[int]] = ([], [], [])
    for row in range(total):
        g = games.setdefault(columns[game][row] if game is not None else 0, len(games))
        if g == len(known):
            known.append({})
        ids = [known[g].setdefault(columns[side][row], len(known[g])) for side in (left, right)]
        for column, value in zip(index, (g, *ids), strict=True):
            column.append(value)
    shares = [_share(value, words, winner, row) for row, value in enumerate(columns[winner])]
    weights = None
    if weight is not None:
        weights = torch.tensor([float(w) for w in columns[weight]], dtype=torch.float64)
    of, i, j = (torch.tensor(column, dtype=torch.int64) for column in index)
    return Comparisons(
        game=of,
        i=i,
        j=j,
        outcome=torch.tensor(shares, dtype=torch.float64),
        weight=weights,
        lengths=torch.tensor([len(ids) for ids in known], dtype=torch.int64),
        games=list(games),
        responses=[list(ids) for ids in known],
    )


def _columns(source: Any, names: list[str]) -> dict[str, list]:
    if isinstance(source, (str, os.PathLike)):
        with open(source, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            present = reader.fieldnames or []
            rows = list(reader)
        table = {name: [row[name] for row in rows] for name in names if name in present}
    else:
        present = list(source.keys())
        table = {name: list(source[name]) for name in names if name in present}
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"source: expected columns {names}, {missing} missing from {present}")
    if len({len(column) for column in table.values()}) > 1:
        lengths = {name: len(column) for name, column in table.items()}
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
        table = i
        i, j, outcome, game, weight = table.i, table.j, table.outcome, table.game, table.weight
        lengths = table.lengths
    columns = {"i": i, "j": j, "outcome": outcome}
    if game is not None and indptr is not None:
        raise ValueError("indptr: give either game or indptr, not both")
    if game is not None:
        columns["game"] = game
    if weight is not None:
        columns["weight"] = weight
    tensors = {name: _column(value, name) for name, value in columns.items()}
    total = tensors["i"].numel()
    for name, column in tensors.items():
        if column.numel() != total:
            raise ValueError(f"{name}: expected {total} entries, like i, got {column.numel()}")
    given = tensors["outcome"].dtype
    if dtype is None:
        dtype = given if given.is_floating_point else torch.get_default_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")

    i, j = tensors["i"], tensors["j"]
    outcome = tensors["outcome"].double().contiguous()
    weight = tensors["weight"].double().contiguous() if weight is not None else None
    lengths = None if lengths is None else _column(lengths, "lengths").to(i.device)
    game, indptr, games = _game_index(tensors.get("game"), indptr, lengths, num_games, i)
    if size is None:
        size = int(lengths.max()) if lengths is not None and lengths.numel() else None
    if size is None:
        size = int(torch.maximum(i.max(), j.max())) + 1 if total else 0
    if size < 2:
        raise ValueError(f"size: a game needs K >= 2 responses, got K = {size}")
    _check(i, j, outcome, weight, game, games, lengths, size)

    if is_native(impl, i.device):
        from sppo_kernels.games import native

        order = None
        if indptr is None:
            indptr, order = native.group(game, games)
        wide = dtype == torch.float64
        return Aggregate(*native.aggregate(i, j, outcome, weight, indptr, order, size, wide))
    from sppo_kernels.games.reference.aggregate import aggregate as reference

    found = reference(i, j, outcome, weight, game, games, size)
    return Aggregate(*(t.to(dtype) for t in found))


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
        reads_values(indptr)
        and (int(indptr[0]) != 0 or int(indptr[-1]) != total or bool((steps < 0).any()))
    ):
        raise ValueError(f"indptr: expected offsets that grow from 0 to N = {total}")
    games = indptr.numel() - 1
    if num_games not in (None, games):
        raise ValueError(f"num_games: indptr describes {games} games, got {num_games}")
    of = torch.repeat_interleave(torch.arange(games, device=i.device), steps, output_size=total)
    return of, indptr, games


def _check(
    i: Tensor,
    j: Tensor,
    outcome: Tensor,
    weight: Tensor | None,
    game: Tensor,
    games: int,
    lengths: Tensor | None,
    size: int,
) -> None:
    if lengths is not None and lengths.numel() != games:
        raise ValueError(f"lengths: expected {games} entries, one a game, got {lengths.numel()}")
    if not reads_values(i) or i.numel() == 0:
        return
    _in_range(game, "game", games, game)
    if lengths is not None and (int(lengths.max()) > size or int(lengths.min()) < 2):
        raise ValueError(f"lengths: expected 2 <= length <= K = {size}, got {lengths.tolist()}")
    limit = size if lengths is None else lengths[game]
    _in_range(i, "i", limit, game)
    _in_range(j, "j", limit, game)
    if bool((i == j).any()):
        at = int((i == j).int().argmax())
        raise ValueError(f"j: response {int(j[at])} is compared with itself in comparison {at}")
    _values(outcome, "outcome", "in [0, 1]", 1.0)
    if weight is not None:
        _values(weight, "weight", "finite and at least 0", torch.finfo(weight.dtype).max)


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


def _values(column: Tensor, name: str, wanted: str, high: float) -> None:
    if not _within(column, 0, high):
        at = int((~((column >= 0) & (column <= high))).int().argmax())
        raise ValueError(f"{name}: expected values {wanted}, got {float(column[at])} at {at}")
