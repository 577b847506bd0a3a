"""From the configuration to a teacher: which of the three it is, its tokenizer, and all that can be wrong with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import Progress
from transformers import PreTrainedModel

from .. import TopKTeacher
from ..cache import CacheWriter, Head, Spec, TeacherCache, model_fingerprint, tokenizer_fingerprint
from ..cache.format import TOKENIZER
from ..options import Options
from ..sparse_checks import check_combination
from . import models
from .config import DistillConfig, TeacherConfig
from .data import Rows
from .teacher import CachedTeacher, ModelTeacher, ServedTeacher, Teacher
from .teacher_pass import TeacherPass, plain_head, write


def describe_teacher(config: TeacherConfig) -> str:
    """A few words for a title."""
    return config.model or Path(config.path or config.cache or config.url or "").name


def needs_teacher(config: DistillConfig) -> bool:
    """Hard labels alone need a teacher only as the measure of held-out text."""
    return config.loss.kd_weight != 0 or bool(config.data.eval)


class TeacherSource:
    """The teacher that a configuration names, step by step: what is cheap to refuse first.

    tokenizer: the teacher's. vocab_size: columns of its head. model: where one is loaded, from :meth:`load` on.

    Raises:
        ValueError: a teacher that is not there, or a loss that it is not good for.
    """

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.model: PreTrainedModel | None = None
        self._cache: TeacherCache | None = None
        self._writer: CacheWriter | None = None
        self._teacher: Teacher | None = None
        self._rows: dict[str, torch.Tensor] = {}  # of what the run will ask for
        teacher = config.teacher
        if teacher.cache is not None:
            self._open_cache(teacher.cache)
        else:
            argument, path = ("teacher.path", teacher.path) if teacher.path else ("student.path", config.student.path)
            assert path is not None
            self.tokenizer = models.load_tokenizer(argument, path)
            self.vocab_size = models.vocab_size_of(argument, path)
        if teacher.url is not None:
            self._check_sparse("topk", 1.0)

    def _open_cache(self, folder: str) -> None:
        path = self.config.teacher.path
        cache = TeacherCache(folder, model=model_fingerprint(path) if path else None)
        if not (cache.folder / TOKENIZER).is_dir():
            raise ValueError(f"teacher.cache={folder!r} has no tokenizer; allowed: one that fastkd cache-teacher wrote")
        self.tokenizer = models.load_tokenizer("teacher.cache", str(cache.folder / TOKENIZER))
        cache.check_made_with("tokenizer", tokenizer_fingerprint(self.tokenizer))
        self._cache, self.vocab_size = cache, cache.spec.vocab_size
        if cache.spec.kind != "hidden":
            self._check_sparse(cache.spec.kind, cache.spec.temperature)

    def _check_sparse(self, kind: str, temperature: float) -> None:
        """Whether the loss is defined for K columns, which depends on no values."""
        loss = self.config.loss
        if loss.vocab != "error":
            raise ValueError(f"loss.vocab={loss.vocab!r} with a teacher of K columns; allowed: error")
        if loss.kd_weight == 0:
            return
        tail = "sampled" if kind == "sampled" else self.config.teacher.tail
        ids = torch.zeros(1, 1, dtype=torch.int64)
        teacher = TopKTeacher(ids, torch.zeros(1, 1), tail, temperature=temperature)
        try:
            check_combination(teacher, None, Options(**dataclasses.asdict(loss)))
        except ValueError as error:
            raise ValueError(f"loss: {error}") from None

    def load(self, train: Rows, held_out: Rows | None, out: Path) -> None:
        """Load the model where one is needed, and plan a cache of the run's own."""
        config = self.config
        if config.loss.kd_weight != 0:
            self._rows["train"] = train.input_ids
        if held_out is not None:
            self._rows["eval"] = held_out.input_ids
        if config.student.keep_blocks is None and (self._cache or config.teacher.url or not needs_teacher(config)):
            return
        path = config.teacher.path
        assert path is not None
        self.model = models.load_model("teacher.path", path).to(self.accelerator.device).eval().requires_grad_(False)
        if config.teacher.cache_hidden and self._rows:
            self._writer = self._plan_cache(self.model, path, out / "teacher_hidden")

    def _plan_cache(self, model: PreTrainedModel, path: str, folder: Path) -> CacheWriter:
        head: Head = plain_head(model, next(iter(self._rows.values())), "teacher.cache_hidden=true")
        precision = {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        vocab_size, width = head.weight.shape
        fingerprints = model_fingerprint(path), tokenizer_fingerprint(self.tokenizer)
        spec = Spec("hidden", "float16", width, vocab_size, *fingerprints, precision)
        return CacheWriter(folder, self._rows, spec, head=head)

    def predicted(self) -> int:
        """Bytes of a cache of the run's own."""
        return 0 if self._writer is None else sum(self._writer.predicted().values())

    def check(self, student_columns: int, progress: Progress) -> None:
        """What only a look at all of a cache, or a question to a server, shows.

        Args:
            student_columns: of the student's head.

        Raises:
            ValueError, RuntimeError: a cache that is damaged or of other rows; a server that does not answer.
        """
        if not self._rows:
            return
        if self.config.teacher.url is not None:
            self._teacher = self._server(student_columns)
        elif self._cache is not None:
            self._teacher = CachedTeacher(self._cache, self._rows, self.accelerator, self.config.teacher.tail)
            verify(self._cache, progress)
        elif self._writer is None:
            assert self.model is not None
            self._teacher = ModelTeacher(self.model, self.accelerator)

    def teacher(self, progress: Progress) -> Teacher | None:
        """The teacher, ready for every row; None where none is needed. Fills a cache of the run's own."""
        if self._writer is None:
            return self._teacher
        assert self.model is not None
        rows_per_batch = self.config.optim.rows_per_batch
        answers = TeacherPass(self.model, self.accelerator, self._writer.spec, None, rows_per_batch)
        write(self._writer, answers, progress, self.tokenizer)
        return CachedTeacher(TeacherCache(self._writer.folder), self._rows, self.accelerator)

    def _server(self, student_columns: int) -> ServedTeacher:
        """Asked for one row, so that what it cannot do is known."""
        served = ServedTeacher(self.config.teacher, student_columns)
        split, rows = next(iter(self._rows.items()))
        try:
            served.batch(split, torch.zeros(1, dtype=torch.int64), rows[:1])
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"teacher.url: the first row of {split}: {error}") from None
        return served


def verify(cache: TeacherCache, progress: Progress) -> None:
    """Compare every checksum: the cache will be read in every epoch, and now is the time to fail."""
    total = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    task = progress.add_task("checking the teacher cache, MB", total=total // 1_000_000, loss="", speed="")
    done = 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        progress.update(task, completed=done // 1_000_000)

    cache.verify(report)
