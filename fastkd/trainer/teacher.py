"""Where the teacher's side of a batch comes from: a model, a cache, or a server. All three give what
:func:`fastkd.trainer.objective.distillation_loss` takes."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .. import TopKTeacher
from ..cache import CachedRows, Head, TeacherCache
from ..teachers import fetch_teachers, stack_teachers
from .config import TeacherConfig
from .objective import Answer


class Teacher(Protocol):
    """A frozen teacher.

    takes_hidden: whether the loss goes without the student's logits, where the student's head allows it.
    temperature: at which its answers can be compared with a student's; None: at any.
    """

    takes_hidden: bool
    temperature: float | None

    def batch(self, split: str, indices: Tensor, input_ids: Tensor) -> Answer | TopKTeacher:
        """Its answer for some rows.

        Args:
            split: "train" or "eval".
            indices: ``(B,)`` rows of the split.
            input_ids: ``(B, S)`` their tokens, on the device.
        """


class ModelTeacher:
    """A model that runs for every batch.

    Args:
        model: the teacher, on the accelerator's device.
        accelerator: gives the precision.
    """

    takes_hidden = False
    temperature: float | None = None

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model.eval().requires_grad_(False), accelerator

    @torch.no_grad()
    def batch(self, split: str, indices: Tensor, input_ids: Tensor) -> Answer:
        """Logits."""
        with self.accelerator.autocast():
            return Answer(logits=self.model(input_ids=input_ids, use_cache=False).logits)


class CachedTeacher:
    """What :mod:`fastkd.cache` has of a teacher.

    Args:
        cache: finished.
        rows: split -> ``(R, S)`` the tokens that will be asked for.
        accelerator: gives device and precision.
        tail: how a cache of kind topk is read.

    Raises:
        ValueError: a split that is not there or is of other tokens.
    """

    takes_hidden = True

    def __init__(
        self,
        cache: TeacherCache,
        rows: dict[str, Tensor],
        accelerator: Accelerator,
        tail: Literal["bucket", "renormalize"] = "bucket",
    ) -> None:
        self.cache, self.accelerator, self.tail = cache, accelerator, tail
        self.splits: dict[str, CachedRows] = {name: cache.rows(name, ids) for name, ids in rows.items()}
        exact = cache.spec.kind == "hidden" or (cache.spec.kind == "topk" and tail == "renormalize")
        self.temperature = None if exact else cache.spec.temperature
        self.head: Head | None = None
        # of the products, so that nothing is converted again at every step
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        if cache.spec.kind == "hidden":
            weight, bias, softcap = cache.head()
            place: dict[str, Any] = {"device": accelerator.device, "dtype": self.dtype}
            self.head = Head(weight.to(**place), None if bias is None else bias.to(**place), softcap)

    def batch(self, split: str, indices: Tensor, input_ids: Tensor) -> Answer | TopKTeacher:
        """Hidden states with the head, or K columns."""
        found = self.splits[split].batch(indices)
        if self.head is None:
            return self.cache.teacher(found, self.tail, input_ids.device)
        return Answer(hidden=found["hidden"].to(input_ids.device, self.dtype), head=self.head)


class ServedTeacher:
    """A server that returns the log-probabilities of prompts.

    Args:
        config: url, server, model, k, tail, timeout.
        vocab_size: of the student.
    """

    takes_hidden = True

    def __init__(self, config: TeacherConfig, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.temperature = None if config.tail == "renormalize" else 1.0

    def batch(self, split: str, indices: Tensor, input_ids: Tensor) -> TopKTeacher:
        """K columns; the last position of a row has none, and no label."""
        config = self.config
        assert config.url is not None
        teachers = fetch_teachers(
            config.url, input_ids.tolist(), config.k, vocab_size=self.vocab_size, server=config.server,
            model=config.model, tail=config.tail, timeout=config.timeout,
        )  # fmt: skip
        return stack_teachers(teachers, input_ids.shape[1]).to(input_ids.device)
