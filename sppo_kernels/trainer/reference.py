"""Reference log-probabilities, computed once and kept on disk under a key of what they need."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppo_kernels.files import atomic_file

FILE = "reference_logps.json"


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


def data_key(examples: Any) -> str:
    """Hash of prompt and response ids, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for ids, responses in zip(examples["prompt_ids"], examples["response_ids"], strict=True):
        digest.update(json.dumps([list(ids), [list(r) for r in responses]]).encode())
    return digest.hexdigest()


def template_key(tokenizer: Any) -> str:
    """Hash of what turns text into ids: vocabulary, special tokens and chat template."""
    if tokenizer is None:
        return "none"
    parts = [getattr(tokenizer, "chat_template", None), str(tokenizer.special_tokens_map)]
    parts.append(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def save(folder: Path, key: dict[str, str], logps: list[list[float]]) -> None:
    """Write key and log-probs, whole or not at all."""
    body = json.dumps({"key": key, "logps": logps})
    check = hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
    with atomic_file(folder / FILE) as temporary:
        temporary.write_text(check + "\n" + body)


def load(folder: Path, key: dict[str, str]) -> list[list[float]] | None:
    """Log-probs saved under `key`; None when nothing is saved.

    Raises:
        ReferenceCacheError: the file is damaged or its key differs; the message says in what.
    """
    path = folder / FILE
    if not path.exists():
        return None
    advice = "remove it to compute anew, or choose another reference_cache"
    check, _, body = path.read_text().partition("\n")
    if hashlib.blake2b(body.encode(), digest_size=16).hexdigest() != check:
        raise ReferenceCacheError(f"{path}: damaged (its checksum does not match); {advice}")
    saved = json.loads(body)
    different = [name for name in key if saved["key"].get(name) != key[name]]
    if different:
        raise ReferenceCacheError(
            f"{path}: made for other {' and '.join(different)} than this run's; {advice}"
        )
    return saved["logps"]


def split_groups(values: Tensor, groups: list[int]) -> list[list[float]]:
    """[S] as a list for each prompt."""
    return [part.tolist() for part in values.split(groups)]
