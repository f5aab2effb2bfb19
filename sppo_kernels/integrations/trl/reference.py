"""Reference log-probabilities of a whole dataset, computed once and cached beside it."""

from __future__ import annotations

import os
from typing import Any

import torch


def with_reference(trainer: Any, dataset: Any, name: str, batch_size: int) -> Any:
    """`dataset` with a column `ref_logps` [K]; read from its cache file when there is one.

    The file's key is of the data, the reference's weights, the truncation and the precision.
    """
    from accelerate.utils import broadcast_object_list, gather_object
    from datasets import Dataset, concatenate_datasets
    from datasets.fingerprint import Hasher

    if "ref_logps" in dataset.column_names:
        return dataset
    collator = trainer.data_collator
    key = (
        dataset._fingerprint,
        trainer._precompute_model_hash,
        collator.max_length,
        collator.truncation_mode,
        trainer.accelerator.mixed_precision,
        "sppo-kernels",
    )
    fingerprint = [Hasher.hash(key)]
    broadcast_object_list(fingerprint, from_process=0)
    # Data held in memory has another cache folder on each rank: all must see the file, or none.
    path = dataset._get_cache_file_path(fingerprint[0])
    there = [os.path.exists(path)]
    if all(gather_object(there) if trainer.args.world_size > 1 else there):
        return concatenate_datasets([dataset, Dataset.from_file(path)], axis=1)
    column = Dataset.from_dict({"ref_logps": _compute(trainer, dataset, name, batch_size)})
    if trainer.accelerator.is_main_process:
        column.map(
            new_fingerprint=fingerprint[0],
            cache_file_name=path,
            desc=f"Caching reference log-probs of {name}",
        )
    trainer.accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, column], axis=1)


def _compute(trainer: Any, dataset: Any, name: str, batch_size: int) -> list[list[float]]:
    """log π_ref of every response, as a list a prompt, in nats; the same list on every rank."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    columns = ("prompt_ids", "response_ids", "chosen_ids", "rejected_ids", "win_rate", "pair")
    rows = dataset.select_columns([c for c in columns if c in dataset.column_names])
    world, rank = trainer.args.world_size, trainer.args.process_index
    # Neighbours in length together: little padding, and the longest first fails first.
    order = sorted(range(len(rows)), key=lambda i: -_length(rows[i]))
    # Every rank runs the same number of forwards, as sharded models need.
    order += order[: -len(order) % world]
    order = order[rank::world]
    model = trainer.ref_model or trainer.model
    training = model.training
    model.eval()
    found: dict[int, list[float]] = {}
    bar = tqdm(
        total=len(order),
        desc=f"Computing reference log-probs of {name}",
        disable=trainer.args.disable_tqdm or rank > 0,
    )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in chosen]))
        logps = trainer.compute_ref_log_probs(model, batch)
        parts = torch.split(logps.float().cpu(), batch["sppo"].groups)
        found.update(zip(chosen, (part.tolist() for part in parts), strict=True))
        bar.update(len(chosen))
    bar.close()
    model.train(training)
    if world > 1:
        found = dict(gather_object(list(found.items())))
    return [found[i] for i in range(len(rows))]


def _length(row: dict[str, Any]) -> int:
    responses = row.get("response_ids") or [row["chosen_ids"], row["rejected_ids"]]
    return len(row["prompt_ids"]) + max(map(len, responses))
