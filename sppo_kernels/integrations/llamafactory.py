"""LLaMA-Factory: its DPO stage with log-probs from hidden states, and with the SPPO loss.

    import sppo_kernels.integrations.llamafactory as sppo_llamafactory
    sppo_llamafactory.patch(loss="sppo", eta=1000.0)

or `python -m sppo_kernels.integrations.llamafactory train.yaml` (also under torchrun) instead of
`llamafactory-cli train train.yaml`, whose own torchrun would start unpatched processes.

Follows LLaMA-Factory 0.9.5: llamafactory/train/dpo/trainer.py, train/trainer_utils.py,
data/{converter,collator}.py, data/processor/pairwise.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sppo_kernels import checks
from sppo_kernels.integrations._capture import forget_heads, fused_head
from sppo_kernels.integrations._pairs import pair_loss, pair_rewards
from sppo_kernels.integrations._swap import Hook, Installed, IntegrationError, resolve

__all__ = ["batch_logps", "patch", "patched", "trainer_class", "unpatch"]

TESTED = "LLaMA-Factory 0.9.5"
IGNORED = -100
COLUMNS = ("chosen_probs_win", "chosen_probs_lose")
AVERAGED = ("ipo", "orpo", "simpo")
_installed = Installed("llamafactory", TESTED, after=forget_heads)


def batch_logps(
    token_logps: Tensor, labels: Tensor, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """What LLaMA-Factory's `get_batch_logps` returns, from log-probs of the shifted labels.

    Args:
        token_logps: [B, T], 0 where ignored; labels: [B, T], shifted already, −100 to ignore.
        ld_alpha: weight of the tokens beyond the shorter response's length (LD-DPO,
            arXiv 2409.06411); rows are chosen responses, then as many rejected. None for 1.

    Returns:
        Sums of log-probabilities [B], in nats, and numbers of tokens [B].
    """
    mask = labels != IGNORED
    lengths = mask.sum(-1)
    if ld_alpha is None:
        return token_logps.sum(-1), lengths
    half = len(labels) // 2
    shorter = torch.minimum(lengths[:half], lengths[half:]).repeat(2)
    end = mask.int().argmax(1) + shorter
    inside = torch.arange(labels.shape[1], device=labels.device) < end[:, None]
    weights = torch.where(inside, 1.0, ld_alpha)
    return (token_logps * weights).sum(-1), lengths


def trainer_class(
    base: type, *, loss: str = "dpo", eta: float | None = None, win_rates: str = "hard"
) -> type:
    """A subclass of LLaMA-Factory's `CustomDPOTrainer` that never holds logits.

    Args:
        base: CustomDPOTrainer. loss, eta, win_rates: as in `patch`.
    """

    class SPPOCustomDPOTrainer(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if loss != "sppo":
                return
            if not self.finetuning_args.use_ref_model or self.loss_type != "sigmoid":
                raise IntegrationError(
                    "pref_loss: expected LLaMA-Factory's default 'sigmoid' where sppo takes its "
                    f"place, got {self.loss_type!r}"
                )
            if self.bco_gemma > 1e-6:
                raise IntegrationError(f"pref_bco_weight: expected 0, got {self.bco_gemma}")

        def concatenated_forward(
            self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
        ) -> dict[str, Tensor]:
            """Log-probs of chosen and rejected responses; the "logits" are means over V, [B, T]."""
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "win_rates")}
            labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            with fused_head(model, labels, mean_logits=True) as got:
                model(**inputs, return_dict=True, use_cache=False)
            ld_alpha = None if is_ref_model else self.ld_alpha
            logps, lengths = batch_logps(got["logps"], labels, ld_alpha)
            average = logps / lengths
            logps = average if self.loss_type in AVERAGED else logps
            chosen, rejected = logps.chunk(2)
            chosen_logits, rejected_logits = got["mean_logits"].chunk(2)
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                "chosen_logits": chosen_logits,
                "rejected_logits": rejected_logits,
                "chosen_logps_avg": average.chunk(2)[0],
            }

        def get_batch_loss_metrics(self, model: Any, batch: dict, train_eval: str = "train") -> Any:
            self._win_rates = batch.get("win_rates")
            return super().get_batch_loss_metrics(model, batch, train_eval)

        def compute_preference_loss(
            self,
            policy_chosen_logps: Tensor,
            policy_rejected_logps: Tensor,
            reference_chosen_logps: Tensor | None,
            reference_rejected_logps: Tensor | None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            """SPPO's losses of the pairs [B] and the rewards; other losses are the base's."""
            policy = (policy_chosen_logps, policy_rejected_logps)
            ref = (reference_chosen_logps, reference_rejected_logps)
            if loss != "sppo":
                return super().compute_preference_loss(*policy, *ref)
            wins = None
            if win_rates == "columns":
                if self._win_rates is None:
                    raise IntegrationError(_no_rates())
                wins = self._win_rates.to(policy[0].device).chunk(2)
            beta = self.beta if eta is None else 1.0 / eta
            losses = pair_loss(policy, ref, wins, beta=beta, reduction="none")
            return losses, *pair_rewards(policy, ref, self.beta)

    SPPOCustomDPOTrainer.__name__ = SPPOCustomDPOTrainer.__qualname__ = base.__name__
    return SPPOCustomDPOTrainer


def _no_rates() -> str:
    return (
        f"win_rates='columns': expected the columns {COLUMNS[0]} and {COLUMNS[1]} in the data set, "
        "found none; a data set cached before patch() needs overwrite_cache: true"
    )


def _converter(original: Any) -> Any:
    def __call__(self: Any, example: dict[str, Any]) -> dict[str, Any]:
        if any(example.get(name) is None for name in COLUMNS):
            raise IntegrationError(_no_rates())
        output = original(self, example)
        output["_win_rates"] = [float(example[name]) for name in COLUMNS]
        return output

    return __call__


def _processor(original: Any) -> Any:
    def preprocess_dataset(self: Any, examples: dict[str, list]) -> dict[str, list]:
        if "_win_rates" not in examples:
            raise IntegrationError(_no_rates())
        gathered: dict[str, list] = defaultdict(list)
        for i, rates in enumerate(examples["_win_rates"]):
            # one at a time, so that examples which the processor drops take their rates along
            output = original(self, {k: v[i : i + 1] for k, v in examples.items()})
            for key, values in output.items():
                gathered[key].extend(values)
            if len(gathered["chosen_input_ids"]) > len(gathered["win_rates"]):
                gathered["win_rates"].append(rates)
        return gathered

    return preprocess_dataset


def _collator(original: Any) -> Any:
    def __call__(self: Any, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if any("win_rates" not in f for f in features):
            raise IntegrationError(_no_rates())
        batch = original(self, features)
        batch["win_rates"] = torch.tensor([f["win_rates"][k] for k in (0, 1) for f in features])
        return batch

    return __call__


def _hooks(loss: str, eta: float | None, win_rates: str) -> Iterator[Hook]:
    checks.choice("loss", loss, ("dpo", "sppo"))
    checks.choice("win_rates", win_rates, ("hard", "columns"))
    if eta is not None:
        checks.positive("eta", eta)
    module = "llamafactory.train.dpo.trainer"
    trainer = f"{module}:CustomDPOTrainer"
    sides = "policy_chosen_logps, policy_rejected_logps"
    sides += ", " + sides.replace("policy", "reference")
    yield Hook(trainer, "concatenated_forward", "self, model, batch, is_ref_model")
    yield Hook(trainer, "compute_preference_loss", f"self, {sides}")
    yield Hook(trainer, "get_batch_loss_metrics", "self, model, batch, train_eval")
    options = {"loss": loss, "eta": eta, "win_rates": win_rates}
    yield Hook(module, "CustomDPOTrainer", None, lambda base: trainer_class(base, **options))
    if loss != "sppo" or win_rates != "columns":
        return
    converters = resolve("llamafactory.data.converter:DATASET_CONVERTERS", TESTED, dict)
    for cls in set(converters.values()):
        yield Hook(cls, "__call__", "self, example", _converter)
    processor = "llamafactory.data.processor.pairwise:PairwiseDatasetProcessor"
    yield Hook(processor, "preprocess_dataset", "self, examples", _processor)
    collator = "llamafactory.data.collator:PairwiseDataCollatorWithPadding"
    yield Hook(collator, "__call__", "self, features", _collator)


def patch(*, loss: str = "dpo", eta: float | None = None, win_rates: str = "hard") -> None:
    """Make LLaMA-Factory's DPO stage (`stage: dpo`) compute log-probs from hidden states.

    Args:
        loss: "dpo" keeps the loss that `pref_loss` names; "sppo" takes its place.
        eta: η; None for 1/pref_beta.
        win_rates: "hard": `sk.pairwise_loss` of kind "sppo_hard" (as TRL); "columns": of kind
            "sppo" (arXiv 2405.00675, eq. (4.4)) with the win rates of the data set's columns
            chosen_probs_win and chosen_probs_lose, the released SPPO layout.

    Raises:
        ImportError: llamafactory, or a package that it needs, is not installed. IntegrationError:
            it is laid out otherwise than in the version tested, or patched already; nothing is
            changed then.
    """
    _installed.install(_hooks(loss, eta, win_rates))


unpatch = _installed.uninstall
patched = _installed.scoped(patch)


def main() -> None:
    """Train as LLaMA-Factory does, patched; its own arguments follow ours."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sppo-loss", choices=("dpo", "sppo"), default="sppo")
    parser.add_argument("--sppo-eta", type=float, default=None, help="default: 1/pref_beta")
    parser.add_argument("--sppo-win-rates", choices=("hard", "columns"), default="hard")
    ours, rest = parser.parse_known_args()
    patch(loss=ours.sppo_loss, eta=ours.sppo_eta, win_rates=ours.sppo_win_rates)
    sys.argv = [sys.argv[0], *rest]
    from llamafactory.train.tuner import run_exp

    run_exp()


if __name__ == "__main__":
    main()
