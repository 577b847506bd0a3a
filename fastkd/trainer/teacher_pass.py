"""One pass of a teacher over rows, into the tensors that a cache stores."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import TopKTeacher
from ..cache import CacheWriter, Head, Spec
from ..cache.fingerprint import checksum
from ..cache.format import DTYPES
from ..teachers import sample_from_hidden, sample_from_logits, topk_from_hidden, topk_from_logits
from .heads import final_hidden, find_head


class TeacherPass:
    """The teacher's answers for rows, as :class:`fastkd.cache.CacheWriter` stores them.

    Args:
        model: in evaluation mode, on the accelerator's device.
        accelerator: gives the precision.
        spec: what is wanted.
        head: of the model; None: logits come from the model as a whole.
        rows_per_batch: rows in one forward pass.
        advance: told the rows after each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        spec: Spec,
        head: Head | None,
        rows_per_batch: int,
        advance: Any = lambda rows: None,
    ) -> None:
        self.model, self.accelerator, self.spec, self.head = model, accelerator, spec, head
        self.rows_per_batch, self.advance = rows_per_batch, advance

    @torch.no_grad()
    def __call__(self, split: str, first_row: int, input_ids: Tensor) -> dict[str, Tensor]:
        """Tensors of the rows ``input_ids (R, S)``, on the CPU."""
        pieces: list[dict[str, Tensor]] = []
        for piece in input_ids.split(self.rows_per_batch):
            row = first_row + len(pieces) * self.rows_per_batch
            with self.accelerator.autocast():
                found = self._answers(piece.to(self.accelerator.device), f"{self.spec.seed} {split} {row}")
            pieces.append({name: x.cpu() for name, x in found.items()})
            self.advance(len(piece))
        return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}

    def _answers(self, input_ids: Tensor, key: str) -> dict[str, Tensor]:
        if self.spec.kind == "hidden":
            return {"hidden": final_hidden(self.model, input_ids).to(DTYPES[self.spec.dtype])}
        keywords: dict[str, Any] = {"temperature": self.spec.temperature}
        if self.spec.kind == "sampled":
            # of their own for each batch: what is drawn does not depend on who wrote what before
            keywords["generator"] = torch.Generator(input_ids.device).manual_seed(int(checksum(key.encode())[:15], 16))
            keywords["proposal_temperature"] = self.spec.proposal_temperature
        teacher = self._from_head(input_ids, keywords) if self.head else self._from_logits(input_ids, keywords)
        weights = {} if teacher.weights is None else {"weights": teacher.weights}
        return {"ids": teacher.ids, "logprobs": teacher.logprobs.to(DTYPES[self.spec.dtype]), **weights}

    def _from_head(self, input_ids: Tensor, keywords: dict[str, Any]) -> TopKTeacher:
        assert self.head is not None
        make = topk_from_hidden if self.spec.kind == "topk" else sample_from_hidden
        hidden = final_hidden(self.model, input_ids)
        head = self.head
        return make(hidden, head.weight, self.spec.width, bias=head.bias, softcap=head.softcap, **keywords)

    def _from_logits(self, input_ids: Tensor, keywords: dict[str, Any]) -> TopKTeacher:
        make = topk_from_logits if self.spec.kind == "topk" else sample_from_logits
        return make(self.model(input_ids=input_ids, use_cache=False).logits, self.spec.width, **keywords)


def plain_head(model: PreTrainedModel, input_ids: Tensor, setting: str) -> Head:
    """The head that goes into a cache of hidden states.

    Raises:
        ValueError: the model does more to its logits than the head; names the ``setting`` that asked for it.
    """
    head = find_head(model, input_ids[:1].to(model.device))
    if head is None:
        raise ValueError(
            f"{setting} does not fit {type(model).__name__}, which changes its logits after the head (or wraps it)"
        )
    return head


def write(
    writer: CacheWriter,
    teacher: TeacherPass,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase,
    repair: bool = False,
) -> None:
    """Open the folder and write what is missing, with a bar of rows, rows/s and the time left."""
    writer.open(tokenizer.save_pretrained, repair)
    total = sum(map(len, writer.splits.values()))
    task = progress.add_task("teacher", total=total, completed=writer.done_rows(), loss="", speed="")
    began, own = time.perf_counter(), 0

    def advance(rows: int) -> None:
        nonlocal own
        own += rows
        progress.update(task, advance=rows, speed=f"{own / (time.perf_counter() - began):,.1f} rows/s")

    teacher.advance = advance
    writer.run(teacher, lambda done: progress.update(task, completed=done))
