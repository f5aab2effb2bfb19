"""Result types of the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SPPOOutput(NamedTuple):
    """What the fused losses return.

    Attributes:
        loss: the reduced loss, float32, shape [] (or [S] with `reduction="none"`); differentiable.
        logps: log-probability of every response under the policy, float32, shape [S], in nats;
            detached, for metrics.
    """

    loss: Tensor
    logps: Tensor


class TokenStats(NamedTuple):
    """What `linear_token_stats` returns: tensors of the labels' shape, or None if not asked for.

    With u the logits of a row and p = softmax(u); 0 (or False) for ignored labels; float32
    (float64 for float64), in nats.

    Attributes:
        logps: log p of the label; differentiable.
        entropy: -Σ p log p; differentiable.
        log_sum_sq_probs: log Σ p², minus the Rényi entropy of order 2; no gradient.
        mean_logits: the mean of u over the vocabulary; no gradient.
        is_top1: bool, whether the label is the first maximum of u.
    """

    logps: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class SPPOTargets(NamedTuple):
    """What SPPO trains on, for a batch of games of K responses.

    Attributes:
        win_rate: [..., K], P(y_i beats the policy), in the dtype of the input; 1/2 past a game's
            length. Differentiable.
        target: [..., K], eta * (win_rate - 1/2), the log-ratio to reach, in nats. Differentiable.
        best: [...] int64, the first response of the largest win rate (or score).
        worst: [...] int64, the last response of the smallest one; never equal to `best`.
        chosen_prob: [...], probability that `best` beats `worst`. Differentiable.
    """

    win_rate: Tensor
    target: Tensor
    best: Tensor
    worst: Tensor
    chosen_prob: Tensor


class Pairs(NamedTuple):
    """Chosen and rejected response of each game: int64 [...], `best` never equal to `worst`."""

    best: Tensor
    worst: Tensor


class Equilibrium(NamedTuple):
    """A mixed strategy of each game and how far it is from an equilibrium.

    Attributes:
        strategy: [..., K] float64, probabilities that sum to 1; 0 past a game's length.
        residual: [...] float64, at least 0; for `nash` the exploitability, in win rate.
    """

    strategy: Tensor
    residual: Tensor


class Strengths(NamedTuple):
    """Bradley-Terry strengths of each game.

    Attributes:
        strength: [..., K] float64, log-odds with mean 0 over a game's responses, 0 past its length;
            NaN for a game that is not connected, since no finite strengths fit it.
        connected: [...] bool, whether wins link every response to every other.
    """

    strength: Tensor
    connected: Tensor


class Tournament(NamedTuple):
    """Majority relation of each game, in which i beats j when P_ij > P_ji.

    Attributes:
        condorcet: [...] int64, the response that beats all others, -1 if there is none.
        smith: [..., K] bool, the smallest set whose members all beat all others.
        cycles: [...] int64, number of 3-cycles i > j > k > i.
    """

    condorcet: Tensor
    smith: Tensor
    cycles: Tensor


class Aggregate(NamedTuple):
    """Pairwise judgements pooled by game.

    Attributes:
        P: [G, K, K], share of the weight between i and j that went to i; 1/2 where they never met.
        counts: [G, K, K], weight of the comparisons between i and j.
        win_rate: [G, K], macro: mean of P over the opponents met; 1/2 if never compared.
        win_rate_micro: [G, K], micro: all comparisons of a response pooled; 1/2 likewise.
        count: [G, K], weight of all comparisons of a response.
    """

    P: Tensor
    counts: Tensor
    win_rate: Tensor
    win_rate_micro: Tensor
    count: Tensor


class Comparisons(NamedTuple):
    """A table of judgements as tensors, with the names behind the numbers.

    Attributes:
        game, i, j: [N] int64; response i was compared with response j of the same game.
        outcome: [N] float64, share of the win that went to i: 1, 1/2, 0 or a probability.
        weight: [N] float64, or None when every comparison weighs 1.
        lengths: [G] int64, number of responses of each game.
        games: the name of each game.
        responses: for each game, the names of its responses.
    """

    game: Tensor
    i: Tensor
    j: Tensor
    outcome: Tensor
    weight: Tensor | None
    lengths: Tensor
    games: list
    responses: list[list]
