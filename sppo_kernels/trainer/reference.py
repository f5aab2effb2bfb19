"""Reference log-probabilities, computed once and kept on disk under a key of what they need."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.data.collate import COLUMNS, responses_of
from sppo_kernels.data.tokenize import longest
from sppo_kernels.files import atomic_file

logger = logging.getLogger("sppo_kernels")

FILE = "reference_logps.json"
COLUMN = "ref_logps"


class ReferenceCacheError(RuntimeError):
    """Cached reference log-probs belong to other weights, data or template, or are damaged."""


def weights_key(model: nn.Module) -> str:
    """Hash of the reference's parameters: all of them, without adapters."""
    digest = hashlib.blake2b(digest_size=16)
    adapters = ("lora_", "modules_to_save", "adapter")
    for name, value in sorted(model.state_dict().items()):
        if any(part in name for part in adapters):
            continue
        name = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().contiguous().cpu().flatten()
        for piece in flat.split(1 << 24):  # bounded copies
            digest.update(piece.view(torch.uint8).numpy())
    return digest.hexdigest()


def data_key(data: Any) -> str:
    """Hash of prompt and response ids, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in _inputs(data):
        ids, responses = row["prompt_ids"], responses_of(row)
        digest.update(json.dumps([list(ids), [list(r) for r in responses]]).encode())
    return digest.hexdigest()


def template_key(tokenizer: Any) -> str:
    """Hash of what turns text into ids: vocabulary, special tokens and chat template."""
    if tokenizer is None:
        return "none"
    parts = [getattr(tokenizer, "chat_template", None), str(tokenizer.special_tokens_map)]
    return digest_of([*parts, sorted(tokenizer.get_vocab().items())])


def digest_of(value: Any) -> str:
    """Hash of text, or of a value that JSON can write."""
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save(path: Path, key: dict[str, str], logps: list[list[float]]) -> None:
    """Write key and log-probs, whole or not at all."""
    body = json.dumps({"key": key, "logps": logps})
    with atomic_file(path) as temporary:
        temporary.write_text(digest_of(body) + "\n" + body)


def load(path: Path, key: dict[str, str]) -> list[list[float]] | None:
    """Log-probs saved under `key`; None when nothing is saved.

    Raises:
        ReferenceCacheError: the file is damaged or its key differs; the message says in what.
    """
    if not path.exists():
        return None
    advice = "remove it to compute anew, or choose another reference_cache"
    check, _, body = path.read_text().partition("\n")
    if digest_of(body) != check:
        raise ReferenceCacheError(f"{path}: damaged (its checksum does not match); {advice}")
    saved = json.loads(body)
    different = [name for name in key if saved["key"].get(name) != key[name]]
    if different:
        raise ReferenceCacheError(
            f"{path}: made for other {' and '.join(different)} than this run's; {advice}"
        )
    return saved["logps"]


def with_reference(
    trainer: Any,
    data: Any,
    path: Path,
    key: dict[str, str],
    compute: Callable[[], list[list[float]]],
) -> Any:
    """`data` with the column `ref_logps` [K]: read from `path`, or computed and saved there.

    The main process reads and writes, so that all ranks see the file or none.

    Raises:
        ReferenceCacheError: see `load`; on every rank.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if trainer.is_world_process_zero():
        try:
            found = [load(path, key)]
        except ReferenceCacheError as error:
            found = [error]
    (logps,) = broadcast_object_list(found)
    if isinstance(logps, ReferenceCacheError):
        raise logps
    if logps is None:
        logps = compute()
        if trainer.is_world_process_zero():
            save(path, key, logps)
    else:
        logger.info("reference log-probs: read from %s", path)
    if COLUMN in data.column_names:
        data = data.remove_columns(COLUMN)
    return data.add_column(COLUMN, logps)


@torch.no_grad()
def reference_logps(
    trainer: Any,
    model: nn.Module,
    data: Any,
    logps_of: Callable[[dict[str, Any]], Tensor],
    batch_size: int,
    title: str,
) -> list[list[float]]:
    """log π_t of every response of `data`, as a list a prompt, in nats; the same on every rank.

    Args:
        trainer: a transformers.Trainer, for its collator, device and ranks.
        model: put in evaluation mode meanwhile.
        logps_of: a batch on the device, with `sppo`, to log-probabilities [S].
        batch_size: prompts a batch.
        title: of the progress bar.
    """
    from accelerate.utils import gather_object
    from tqdm import tqdm

    rows = _inputs(data)
    world, rank = trainer.args.world_size, trainer.args.process_index
    lengths = [longest(row["prompt_ids"], responses_of(row)) for row in rows]
    # Neighbours in length together: little padding, and the longest first fails first.
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    # Every rank runs the same number of forwards, as sharded models need.
    count = -(-len(order) // world) * world
    order = list(itertools.islice(itertools.cycle(order), rank, count, world))
    found: dict[int, list[float]] = {}
    training = model.training
    model.eval()
    with tqdm(total=len(order), desc=title, disable=trainer.args.disable_tqdm or rank > 0) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in chosen]))
            groups = batch["sppo"].groups
            parts = logps_of(batch).float().cpu().split(groups)
            found.update(zip(chosen, (part.tolist() for part in parts), strict=True))
            bar.update(len(chosen))
    model.train(training)
    if world > 1:
        found = dict(gather_object(list(found.items())))
    return [found[i] for i in range(len(rows))]


def _inputs(data: Any) -> Any:
    """The columns of a datasets.Dataset that say what is computed, without a reference."""
    return data.select_columns([name for name in COLUMNS if name in data.column_names])
