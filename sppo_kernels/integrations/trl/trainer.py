"""SoftSPPOTrainer: TRL's DPOTrainer with soft win rates, K responses a prompt, and a fused loss."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from sppo_kernels.data.collate import COLUMNS
from sppo_kernels.data.rows import DataError
from sppo_kernels.integrations.trl import hooks, rows
from sppo_kernels.integrations.trl.collator import DataCollatorForSoftSPPO, SoftBatch
from sppo_kernels.integrations.trl.config import SoftSPPOConfig
from sppo_kernels.integrations.trl.metrics import trl_metrics
from sppo_kernels.models.probe import checked_head
from sppo_kernels.models.refusals import HeadProbeError
from sppo_kernels.trainer import reference
from sppo_kernels.trainer.forward import LossForward
from sppo_kernels.trainer.metrics import MetricStore

_TRL = hooks.load()
DPOTrainer: Any = _TRL["DPOTrainer"]
use_adapter, disable_gradient_checkpointing = (
    _TRL[name] for name in ("use_adapter", "disable_gradient_checkpointing")
)


class SoftSPPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` that trains by SPPO with soft win rates, arXiv 2405.00675.

    Arguments are those of DPOTrainer; `args` is a `SoftSPPOConfig`. Datasets hold, beside
    `prompt, chosen, rejected` as TRL takes them, the columns of the released SPPO data
    (`chosen_probs_win, chosen_probs_lose`; `chosen_probs` for `sppo_single`); or, for `sppo`,
    `prompt, responses [K]` and `win_rate [K]` or `win_matrix [K][K]`, where K may differ between
    rows. Model, reference, PEFT, truncation, checkpoints and evaluation are DPOTrainer's.

    Raises:
        DataError: a row cannot be used; the message names its number and the column.
        HeadProbeError: the fused loss would not compute what the model's head does.
        NotImplementedError: vision data, ZeRO-3, or context, sequence or tensor parallelism.
        TypeError: `args` is no SoftSPPOConfig, or `data_collator` builds other batches.
    """

    _name = "SPPO"
    _tag_names = ("trl", "sppo")
    _paper: ClassVar[dict[str, str]] = {
        "title": "Self-Play Preference Optimization for Language Model Alignment",
        "id": "2405.00675",
        "citation": "@article{wu2024self,\n    title = {Self-Play Preference Optimization for "
        "Language Model Alignment},\n    author = {Wu, Yue and Sun, Zhiqing and Yuan, Huizhuo and "
        "Ji, Kaixuan and Yang, Yiming and Gu, Quanquan},\n    year = 2024,\n    eprint = "
        "{arXiv:2405.00675}\n}",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: SoftSPPOConfig | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SoftSPPOConfig(f"{name.split('/')[-1] or 'model'}-SPPO")
        if not isinstance(args, SoftSPPOConfig):
            raise TypeError(f"args: expected SoftSPPOConfig, got {type(args).__name__}")
        self._soft = args.soft
        self._forward: LossForward | None = None
        if self._soft is None:  # a loss of TRL's: the parent does everything
            self._name, self._paper = DPOTrainer._name, DPOTrainer._paper
            self._tag_names = DPOTrainer._tag_names
        else:
            self._stores = {mode: MetricStore(args.eta) for mode in ("train", "eval")}
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if self._soft is not None:
            self._set_up()

    # --- set-up -----------------------------------------------------------------------------------

    def _set_up(self) -> None:
        """Our collator, and the fused loss in policy and reference; once."""
        if self._forward is not None:
            return
        if self._is_vision_dataset:
            raise NotImplementedError(
                f"train_dataset: loss_type {self._soft!r} takes text, got a column of images"
            )
        self._refuse_parallelism()
        if not isinstance(self.data_collator, DataCollatorForSoftSPPO):
            if type(self.data_collator) is not _TRL["DataCollatorForPreference"]:
                raise TypeError(
                    f"data_collator: loss_type {self._soft!r} needs DataCollatorForSoftSPPO, got "
                    f"{type(self.data_collator).__name__}"
                )
            names = hooks.COLLATOR
            self.data_collator = DataCollatorForSoftSPPO(
                **{name: getattr(self.data_collator, name) for name in names}
            )
        args = self.args
        checked_head(self.model, impl=args.impl)
        # a sharded reference is compared at its first call, when all ranks make it whole
        if self.ref_model is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            checked_head(self.ref_model, impl=args.impl)
        self._forward = LossForward(args.loss_settings())

    def _refuse_parallelism(self) -> None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise NotImplementedError(
                "DeepSpeed ZeRO-3 partitions the head's weight, which the fused loss reads whole; "
                "use ZeRO-2 or FSDP"
            )
        if plugin is not None and self.precompute_ref_logps and self.ref_model is None:
            raise NotImplementedError(
                "precompute_ref_log_probs with DeepSpeed and no ref_model: pass ref_model, or "
                "compute the reference online"
            )
        parallel = self.accelerator.parallelism_config
        for name in ("tp_size", "cp_size", "sp_size"):
            if (getattr(parallel, name, 1) or 1) > 1:
                raise NotImplementedError(
                    f"parallelism_config.{name}={getattr(parallel, name)}: loss_type "
                    f"{self._soft!r} needs whole sequences and a whole head on each rank"
                )

    def release(self) -> None:
        """Nothing is left in the models between calls; kept for callers."""

    # --- data -------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if self._soft is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        first = next(iter(dataset), None)
        if first is None:
            raise DataError(f"{dataset_name}: expected at least one row, got none")
        settings: dict[str, Any] = {"with_indices": True}
        if hasattr(dataset, "num_rows"):  # streams take neither
            settings |= {
                "num_proc": args.dataset_num_proc,
                "desc": f"Win rates of {dataset_name}",
            }
        if not rows.is_group(first):
            with args.main_process_first(desc=f"win rates of {dataset_name}"):
                dataset = dataset.map(rows.pair_targets, fn_kwargs={"kind": self._soft}, **settings)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._soft != "sppo":
            raise DataError(
                f"{dataset_name}: loss_type {self._soft!r} is that of pairs; expected the columns "
                "chosen and rejected, got responses (loss_type 'sppo' takes them)"
            )
        if not hasattr(processing_class, "eos_token"):
            raise NotImplementedError(
                f"{dataset_name}: responses are tokenized by a tokenizer, got "
                f"{type(processing_class).__name__}"
            )
        limit = args.max_length
        with args.main_process_first(desc=f"tokenization of {dataset_name}"):
            dataset = dataset.map(
                rows.group_example,
                fn_kwargs={"tokenizer": processing_class, "max_length": limit},
                **settings,
            )
            if limit is not None and args.truncation_mode == "keep_start":
                # as TRL: nothing of a response would be left of these
                dataset = dataset.filter(_Fits(limit))
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._soft is None:
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            self._signature_columns = [*COLUMNS, reference.COLUMN]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self._soft is None or not hasattr(dataset, "num_rows"):  # the parent refuses streams
            return super()._precompute_ref_logps(dataset, name, batch_size)
        self._set_up()
        if reference.COLUMN in dataset.column_names:
            return dataset
        collator = self.data_collator
        key = {
            "data": reference.data_key(dataset),
            "weights": self._precompute_model_hash,
            "truncation": f"{collator.truncation_mode} {collator.max_length}",
            "precision": self.accelerator.mixed_precision,
        }
        path = Path(dataset._get_cache_file_path(reference.digest_of(key))).with_suffix(".json")
        model = self.ref_model or self.model

        def compute() -> list[list[float]]:
            logps = functools.partial(self.compute_ref_log_probs, model)
            title = f"Computing reference log-probs of {name}"
            return reference.reference_logps(self, model, dataset, logps, batch_size, title)

        return reference.with_reference(self, dataset, path, key, compute)

    # --- loss -------------------------------------------------------------------------------------

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """log π_ref [S] of the responses of a batch, in nats (TRL's pair of tensors for its own).

        As in TRL, a PEFT model without `ref_model` is its own reference: with its adapters
        disabled, or by its adapter named "ref" when it came with a trained one.
        """
        if self._soft is None:
            return super().compute_ref_log_probs(model, inputs)
        host: SoftBatch = inputs["sppo"]
        adapters = contextlib.nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and is_peft_model(policy):
            adapters = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        checkpointing = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing, adapters, self.accelerator.autocast():
            return self._forward.loss(model, host.replaced(None), **_tensors(inputs))[1]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._soft is None:
            return super()._compute_loss(model, inputs, return_outputs)
        host: SoftBatch = inputs["sppo"]
        ref: Tensor | None = host.ref_logps
        if not self.precompute_ref_logps:
            ref = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        elif ref is None:
            raise DataError("precompute_ref_log_probs=True, but rows have no ref_logps")
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        # the reference's precision, whatever the wrappers of the model set
        with self.accelerator.autocast():
            loss, logps, output = self._forward.loss(
                model, host.replaced(ref), **_tensors(inputs), **router
            )
        aux = output.aux_loss if self.aux_loss_enabled else None
        # TRL's sppo_hard is the sum over a pair, the released soft losses are its mean
        factor = self.loss_weights[0] * (2.0 if self._soft == "sppo_hard" else 1.0)
        loss = loss * factor
        if aux is not None:
            loss = loss + self.router_aux_loss_coef * aux
        mode = "train" if self.model.training else "eval"
        self._stores[mode].add(logps, host, ref, aux)
        if not return_outputs:
            return loss
        with torch.no_grad():  # logits for compute_metrics, as the parent gives them
            return loss, model(**_tensors(inputs), use_cache=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add TRL's and SPPO's metrics to what the Trainer reports."""
        if self._soft is not None:
            mode = "train" if self.model.training else "eval"
            found = self._stores[mode].gather(self.args.world_size)
            if found is not None:
                self._total_train_tokens += found.tokens if mode == "train" else 0
                values = {
                    "num_tokens": self._total_train_tokens,
                    **trl_metrics(found, self.args.eta),
                }
                self._metrics[mode] |= {name: [value] for name, value in values.items()}
        super().log(logs, start_time)


class _Fits:
    """Whether a row's prompt leaves room for its responses; a class, so that its hash is stable."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, example: dict[str, Any]) -> bool:
        return len(example["prompt_ids"]) < self.limit


def _tensors(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "sppo"}


__all__ = ["HeadProbeError", "SoftSPPOTrainer"]
