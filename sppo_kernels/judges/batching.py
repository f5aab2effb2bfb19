"""What judges that run a model share: texts that are too long, and batches of similar lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sppo_kernels.data.collate import pad
from sppo_kernels.data.rows import OverLengthError
from sppo_kernels.judges.base import JudgeError

logger = logging.getLogger("sppo_kernels")


class ModelJudge:
    """Base of judges that run a model; `name` and `items` are for their messages.

    Args:
        batch_size: items scored at once.
        max_length: most tokens of an item.
        overlong: "refuse": a text that does not fit is an error; "truncate": it is cut, counted in
            `truncated`, and reported once a call.
        device: of the model. progress: whether to show a bar.

    Raises:
        JudgeError: an unknown `overlong`.
    """

    name = "judge"
    items = "texts"

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        overlong: str,
        device: str | torch.device,
        progress: bool,
    ) -> None:
        if overlong not in ("refuse", "truncate"):
            raise JudgeError(f"overlong: expected 'refuse' or 'truncate', got {overlong!r}")
        self.batch_size, self.max_length, self.overlong = batch_size, max_length, overlong
        self.device, self.progress = torch.device(device), progress
        self.truncated = 0
        self._over: list[int] = []

    def fit(self, ids: list[int], room: int, *, keep_end: bool = False) -> list[int]:
        """At most `room` of the ids, the first or the last; `score` answers for what was cut."""
        if len(ids) <= room:
            return ids
        self._over.append(len(ids))
        return ids[len(ids) - room :] if keep_end else ids[: max(0, room)]

    @torch.no_grad()
    def score(
        self,
        items: Iterable[list[int]],
        model: Callable[[Tensor, Tensor], Tensor],
        fill: int,
        batch_size: int | None = None,
    ) -> Tensor:
        """Numbers [n] float32 of `model(ids [b, T], mask [b, T]) -> [b]`, in the order of `items`.

        Raises:
            OverLengthError: texts did not fit while the items were made, and `overlong` refuses.
        """
        self._over = []
        items = list(items)
        if self._over:
            report = (
                f"{self.name}: {len(self._over)} texts in {len(items)} {self.items} do not fit "
                f"max_length={self.max_length} (longest: {max(self._over)} tokens)"
            )
            if self.overlong == "refuse":
                raise OverLengthError(f"{report}; raise max_length or choose overlong='truncate'")
            self.truncated += len(self._over)
            logger.warning("%s and were cut for judging", report)
        # Neighbours in length together; pads are masked and do not change scores.
        order = sorted(range(len(items)), key=lambda k: len(items[k]))
        size = batch_size or self.batch_size
        starts = range(0, len(order), size)
        if self.progress:
            from tqdm import tqdm

            starts = tqdm(starts, desc=f"judge ({self.name})")
        found = torch.zeros(len(items))
        for start in starts:
            chosen = order[start : start + size]
            ids, mask = pad([items[k] for k in chosen], fill)
            found[chosen] = model(ids.to(self.device), mask.to(self.device)).float().cpu()
        return found
