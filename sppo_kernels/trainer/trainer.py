"""SPPOTrainer: transformers' Trainer with the SPPO loss, its data and its reference."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from sppo_kernels import sppo_loss
from sppo_kernels.data.collate import SPPOCollator
from sppo_kernels.data.tokenize import prepare_dataset
from sppo_kernels.models.head import causal_lm
from sppo_kernels.optional import require
from sppo_kernels.trainer import reference
from sppo_kernels.trainer.config import SPPOConfig
from sppo_kernels.trainer.forward import LossForward, probe
from sppo_kernels.trainer.metrics import MetricStore
from sppo_kernels.trainer.objective import pairwise_settings


class SPPOTrainer(Trainer):
    """Trains a causal language model on preference games, by arXiv 2405.00675.

    Args:
        model: a transformers causal LM or a PEFT model around one; also its initial weights are the
            reference π_t (for PEFT: the model without adapters), unless `ref_model` is given.
        args: SPPOConfig.
        train_dataset, eval_dataset: rows (datasets.Dataset, list of dicts, or a Parquet path) with
            `prompt, responses, win_matrix | win_rate`, the released SPPO columns, or `chosen,
            rejected`; `prompt_ids, response_ids, ref_logps` are used where given.
        processing_class: the tokenizer; not needed when all rows hold ids.
        ref_model: another reference, of the same vocabulary.
        peft_config: wraps `model` with peft.

    Raises:
        DataError, OverLengthError: rows that cannot be used. HeadProbeError, ReferenceCacheError:
        see `SPPOConfig.head`, `SPPOConfig.packing` and `SPPOConfig.reference_cache`.
    """

    def __init__(
        self,
        model: nn.Module | str,
        args: SPPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, SPPOConfig):
            raise TypeError(f"args: expected SPPOConfig, got {type(args).__name__}")
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            model = require("peft").get_peft_model(model, peft_config)
        if args.gradient_checkpointing and hasattr(model, "get_base_model"):
            model.enable_input_require_grads()
        self.ref_model = ref_model
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        prepared = {
            name: None if rows is None else prepare_dataset(rows, processing_class, args, name)
            for name, rows in given.items()
        }
        pad = getattr(processing_class, "pad_token_id", None)
        self.collator = SPPOCollator(packed=False, pad_token_id=pad or 0)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            processing_class=processing_class,
            **prepared,
            **kwargs,
        )
        # The loss is divided by the responses of all accumulated batches, in compute_loss.
        self.model_accepts_loss_kwargs = True
        self.label_names = []
        self.can_return_loss = True
        self._stores = {"train": MetricStore(args.eta), "eval": MetricStore(args.eta)}
        self._forward: LossForward | None = None
        self._referenced: set[str] = set()

    # --- preparation ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Probe head and packing and compute the reference; called by train and evaluate."""
        if self._forward is None:
            self._forward, packed = probe(
                self.model,
                self._first_examples(2),
                head=self.args.head,
                packing_mode=self.args.packing,
                device=self.args.device,
                settings=self._loss_settings(),
            )
            self.collator.packed = packed
        for name in ("train", "eval"):
            data = getattr(self, f"{name}_dataset")
            if data is not None and name not in self._referenced:
                setattr(self, f"{name}_dataset", self._with_reference(data, name))
                self._referenced.add(name)

    def _first_examples(self, count: int) -> list[dict[str, Any]]:
        data = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        return [data[i] for i in range(min(count, len(data)))]

    def _loss_settings(self) -> dict[str, Any]:
        settings = self.args.loss_settings()
        if self.args.objective != "sppo":
            settings["pairwise"] = pairwise_settings(self.args)
        return settings

    def release(self) -> None:
        """Nothing is left in the model between calls; kept for callers."""

    def _with_reference(self, data: Any, name: str) -> Any:
        if all(x is not None for x in data["ref_logps"]):
            return data
        folder = Path(self.args.reference_cache or self.args.output_dir) / f"reference-{name}"
        key = {
            "weights": reference.weights_key(self.ref_model or causal_lm(self.model)),
            "data": reference.data_key(data),
            "template": reference.template_key(self.processing_class),
        }
        title = f"reference log-probs ({name})"
        return reference.with_reference(
            self, data, folder / reference.FILE, key, lambda: self.reference_logps(data, title)
        )

    def reference_logps(self, data: Any, title: str = "reference log-probs") -> list[list[float]]:
        """log π_t of every response of `data`, as a list a prompt, in nats."""
        model, forward = self.model, self._forward
        if self.ref_model is not None:
            model, forward = self.ref_model, self._reference_forward()

        def logps(batch: dict[str, Any]) -> Tensor:
            host = batch.pop("sppo")
            return forward.loss(model, host, **batch)[1]

        size = self.args.reference_batch_size or self.args.per_device_eval_batch_size
        adapters = getattr(model, "disable_adapter", contextlib.nullcontext)
        with adapters(), self.compute_loss_context_manager(), self.autocast():
            return reference.reference_logps(self, model, data, logps, size, title)

    def autocast(self) -> Any:
        """The precision of training, also for the reference: equal weights give equal numbers."""
        return self.accelerator.autocast()

    def _reference_forward(self) -> LossForward:
        forward, _ = probe(
            self.ref_model.to(self.args.device),
            self._first_examples(1),
            head=self.args.head,
            packing_mode="shared" if self.collator.packed else "padded",
            device=self.args.device,
            settings=self._forward.settings,
        )
        return forward

    def step_zero_check(self) -> float:
        """With the policy as its own reference the loss must be exactly mean (η (w − ½))².

        Returns:
            The loss of the first batch, in `loss_units`.

        Raises:
            RuntimeError: it is not, so values with and without gradient disagree.
        """
        if self.model.training:
            self.model.eval()
            try:
                return self.step_zero_check()
            finally:
                self.model.train()
        batch = self.collator([self.train_dataset[0]])
        host = batch.pop("sppo")
        batch = {k: v.to(self.args.device) for k, v in batch.items()}
        with self.autocast():
            with torch.no_grad():
                _, logps, _ = self._forward.loss(self.model, host, **batch)
            host.ref_logps = logps.cpu()
            loss, again, _ = self._forward.loss(self.model, host, **batch)
        win, settings = host.win_rate.to(logps.device), self.args.loss_settings()
        expected = sppo_loss(logps, logps, win, eta=settings["eta"], units=settings["units"])
        if not torch.allclose(loss.detach(), expected, rtol=1e-6, atol=0):
            raise RuntimeError(
                f"step 0: with an equal reference the loss is {float(loss)}, expected "
                f"{float(expected)}; log-probs with and without gradient differ by up to "
                f"{float((again - logps).abs().max()):.3g} nats"
            )
        return float(loss.detach())

    # --- the Trainer's hooks ----------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare (probe, reference, step-0 check), then train as transformers does."""
        self.prepare()
        if self.args.objective == "sppo":
            self.step_zero_check()
        self._stores["train"].reset()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.prepare()
        self._stores["eval"].reset()
        return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._external(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _external(self, rows: Any) -> Any:
        """Rows given to evaluate(): tokenized and with a reference of their own."""
        if hasattr(rows, "column_names") and "length" in rows.column_names:
            return rows
        data = prepare_dataset(rows, self.processing_class, self.args, "eval_dataset")
        return self._with_reference(data, f"eval-{reference.data_key(data)[:8]}")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        padded = not self.collator.packed and self.args.length_bucketing
        if padded and self.args.train_sampling_strategy == "random":
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(size, lengths=list(data["length"]))
        return super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples or "sppo" not in batch_samples[0]:
            return None
        count = torch.tensor(float(sum(b["sppo"].win_rate.numel() for b in batch_samples)))
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.to(device)).sum()
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean loss of the responses; accumulated batches weigh by their number of responses."""
        host = inputs["sppo"]
        inputs = {name: value for name, value in inputs.items() if name != "sppo"}
        loss, logps, _ = self._forward.loss(model, host, **inputs)
        store = self._stores["train" if model.training else "eval"]
        store.add(logps, host)
        if num_items_in_batch is not None and model.training:
            share = host.win_rate.numel() * self.args.world_size / num_items_in_batch
            loss = loss * share.to(loss.device)
        return (loss, {"logps": logps}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add SPPO's metrics to what the Trainer reports."""
        evaluating = any(k.startswith("eval_") for k in logs)
        prefix, store = ("eval_", "eval") if evaluating else ("", "train")
        if evaluating or "loss" in logs:
            found = self._stores[store].pop(self.args.world_size)
            logs.update({prefix + k: v for k, v in found.items()})
            # the Trainer's own mean weighs batches, not responses
            if evaluating and found and self.args.objective == "sppo":
                logs["eval_loss"] = found[f"loss_{self.args.loss_units}"]
        super().log(logs, start_time)
