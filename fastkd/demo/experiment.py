"""The experiment: one teacher, one start, a student with distillation and one with hard labels alone."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import CacheWriter, Spec, TeacherCache, model_fingerprint, tokenizer_fingerprint
from ..trainer.config import DataConfig, DistillConfig, LossConfig, OptimConfig, StudentConfig, TeacherConfig
from ..trainer.data import Rows, pack, take_in_turn
from ..trainer.evaluate import Evaluation, evaluate, evaluate_teacher
from ..trainer.heads import find_head
from ..trainer.metrics import progress_bar, read_metrics
from ..trainer.models import load_model
from ..trainer.student import block_influence, choose_blocks, find_blocks, prune_depth
from ..trainer.teacher import CachedTeacher
from ..trainer.teacher_pass import TeacherPass, plain_head, write
from ..trainer.train import Outcome, distill
from .plan import ROWS_PER_STEP, Plan
from .text import Corpus

CORRECTION_LR = 2e-4
STUDENT_LR = 5e-4  # the best of 2.5e-4, 5e-4 and 1e-3 for either loss when the recipe was chosen
LOSSES = {
    "kd": LossConfig(kd_weight=0.5, ce_weight=0.5),
    "hard": LossConfig(kd_weight=0.0, ce_weight=1.0),
}


@dataclass
class Measured:
    """A model on the test rows."""

    name: str
    path: Path
    parameters: int
    megabytes: float
    tokens_per_s: float
    test: Evaluation
    sample: str


@dataclass
class Regime:
    """Two students that saw the same tokens under the same schedule."""

    key: str  # reused or fresh
    rows: int
    epochs: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    models: dict[str, Measured] = field(default_factory=dict)


@dataclass
class Splits:
    """Rows of the experiment; no document is in two of training, dev and test."""

    train: Rows  # the first rows are those of the reused regime
    dev: Rows
    test: Rows


def make_splits(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, plan: Plan, seed: int) -> Splits:
    """Tokenize and cut into rows within documents.

    Raises:
        ValueError: the text is too short for the plan.
    """

    def rows_of(documents: list[str], count: int) -> Rows:
        # Rows come from as many documents as possible, so that many documents are enough, and a few to spare for
        # those that are too short.
        chosen = random.Random(seed).sample(documents, min(len(documents), count + count // 4 + 4))
        ids = tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"]
        packed = pack([torch.tensor(i, dtype=torch.int64) for i in ids], plan.seq_len, False, None)
        if len(packed) < count:
            raise ValueError(f"the text gives {len(packed)} rows of {plan.seq_len} tokens where {count} are needed")
        return take_in_turn(packed, count, seed)

    train, dev, test = corpus.split()
    wanted = plan.rows * (plan.epochs if plan.fresh else 1)
    return Splits(rows_of(train, wanted), rows_of(dev, plan.dev_rows), rows_of(test, plan.test_rows))


class Experiment:
    """Runs the parts in order; every training is a run of :func:`fastkd.trainer.train.distill`."""

    def __init__(
        self,
        out: Path,
        teacher_path: Path,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
        plan: Plan,
        accelerator: Accelerator,
        console: Console,
        seed: int,
    ) -> None:
        self.out, self.teacher_path, self.tokenizer = out, teacher_path, tokenizer
        self.splits, self.plan, self.accelerator = splits, plan, accelerator
        self.console, self.seed = console, seed
        self.influence: list[float] = []
        self._save_rows("reused", splits.train.input_ids[: plan.rows])
        self._save_rows("fresh", splits.train.input_ids)
        self._save_rows("dev", splits.dev.input_ids)

    def _save_rows(self, name: str, input_ids: torch.Tensor) -> None:
        Dataset.from_dict({"input_ids": input_ids.tolist()}).save_to_disk(str(self.out / "data" / name))

    def _config(
        self, name: str, teacher: TeacherConfig, student: Path, data: str, epochs: int, loss: LossConfig
    ) -> DistillConfig:
        rows = self.plan.rows * (self.plan.epochs if data == "fresh" else 1)
        return DistillConfig(
            teacher=teacher,
            student=StudentConfig(path=str(student), freeze_embeddings=True),
            data=DataConfig(
                str(self.out / "data" / data),
                str(self.out / "data" / "dev"),
                seq_len=self.plan.seq_len,
                cross_documents=False,
            ),
            output_dir=str(self.out / name),
            loss=loss,
            optim=OptimConfig(lr=STUDENT_LR, weight_decay=0.01, rows_per_batch=ROWS_PER_STEP, epochs=epochs),
            # As many evaluations in one pass over fresh text as in several passes over the other.
            eval_every=rows // ROWS_PER_STEP // (1 if data == "reused" else self.plan.epochs),
            log_every=5,
            checkpoint_every=0,
            select="best",
            precision={"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
            seed=self.seed,
        )

    def correct_teacher(self) -> Path:
        """The teacher after one pass over the training rows with hard labels ("teacher correction" of Minitron,
        arXiv:2408.11796): it then knows the text that it will explain."""
        teacher = TeacherConfig(str(self.teacher_path))
        config = self._config("correction", teacher, self.teacher_path, "reused", 1, LOSSES["hard"])
        config.data.eval, config.select = [], "last"
        config.optim.lr = CORRECTION_LR
        return distill(config, self.console).student_path

    def make_start(self, teacher: PreTrainedModel) -> Path:
        """The start of every student: the teacher without its least influential blocks."""
        rows = self.splits.train.input_ids[:16].to(self.accelerator.device)
        with self.accelerator.autocast():
            self.influence = block_influence(teacher, rows)
        depth = len(find_blocks(teacher)[1])
        start = prune_depth(teacher, choose_blocks(self.influence, round(depth * self.plan.kept_share)))
        start.save_pretrained(self.out / "start")
        self.tokenizer.save_pretrained(self.out / "start")
        return self.out / "start"

    def run_regime(self, key: str, start: Path) -> Regime:
        """Train both students on the same rows in the same order."""
        epochs = self.plan.epochs if key == "reused" else 1
        rows = self.plan.rows * (1 if key == "reused" else self.plan.epochs)
        regime = Regime(key, rows, epochs)
        for kind, loss in LOSSES.items():
            name = f"{kind}-{key}"
            self.console.print(f"\n[bold]{name}[/]: {rows} rows of {self.plan.seq_len} tokens, {epochs} x")
            config = self._config(name, TeacherConfig(cache=str(self.out / "cache")), start, key, epochs, loss)
            regime.outcomes[kind] = distill(config, self.console)
        return regime

    def cache_teacher(self, path: Path, model: PreTrainedModel) -> CachedTeacher:
        """One pass of the corrected teacher over all rows: every student learns from its hidden states, and every
        model is measured against them.

        Args:
            path: of the teacher. model: the same, loaded.
        """
        splits = {name: getattr(self.splits, name).input_ids for name in ("train", "dev", "test")}
        rows = {"train": splits["train"], "eval": splits["dev"], "test": splits["test"]}
        head = plain_head(model, rows["test"], "the demo")
        vocab_size, width = head.weight.shape
        fingerprints = model_fingerprint(path), tokenizer_fingerprint(self.tokenizer)
        spec = Spec("hidden", "float16", width, vocab_size, *fingerprints, str(self.accelerator.mixed_precision))
        writer = CacheWriter(self.out / "cache", rows, spec, head=head)
        answers = TeacherPass(model, self.accelerator, spec, head, ROWS_PER_STEP)
        with progress_bar(self.console) as progress:
            write(writer, answers, progress, self.tokenizer)
        return CachedTeacher(TeacherCache(self.out / "cache"), {"test": rows["test"]}, self.accelerator)

    def measure(
        self, name: str, path: Path, teacher: CachedTeacher, model: PreTrainedModel | None = None, itself: bool = False
    ) -> Measured:
        """Test figures, size, speed and a sample of a saved model; ``itself``: it is the ``teacher``'s."""
        if model is None:
            model = load_model("student", str(path)).to(self.accelerator.device).eval()
        rows, accelerator = self.splits.test, self.accelerator
        if itself:
            own = evaluate_teacher(teacher, rows, "test", accelerator, ROWS_PER_STEP)
            assert own is not None
            test = own
        else:
            head = find_head(model, rows.input_ids[:1].to(accelerator.device))
            test = evaluate(model, head, teacher, rows, "test", accelerator, ROWS_PER_STEP)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
        parameters = sum(p.numel() for p in model.parameters())
        return Measured(name, path, parameters, size, self._speed(model), test, self._sample(model))

    @torch.no_grad()
    def _speed(self, model: PreTrainedModel) -> float:
        """Tokens a second of a forward pass with the head, best of three."""
        ids = self.splits.test.input_ids[:ROWS_PER_STEP].to(self.accelerator.device)
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            with self.accelerator.autocast():
                model(input_ids=ids, use_cache=False)
            best = min(best, time.perf_counter() - began)
        return ids.numel() / best

    @torch.no_grad()
    def _sample(self, model: PreTrainedModel) -> str:
        """Greedy continuation of the first 40 tokens of a test row."""
        prompt = self.prompt_ids()[None].to(self.accelerator.device)
        with self.accelerator.autocast():
            ids = model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        return str(self.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))

    def prompt_ids(self) -> torch.Tensor:
        """``(40,)`` the prompt of the samples."""
        return self.splits.test.input_ids[0, :40]

    def curves(self, regime: Regime) -> dict[str, list[dict]]:
        """Dev evaluations of both students, with the tokens seen at each."""
        tokens = ROWS_PER_STEP * self.plan.seq_len
        return {
            kind: [
                {**m, "tokens": m["step"] * tokens} for m in read_metrics(outcome.metrics_path) if m["event"] == "eval"
            ]
            for kind, outcome in regime.outcomes.items()
        }
