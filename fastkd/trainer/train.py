"""The reference trainer: distil a causal language model. Read it from top to bottom; `distill` is the whole run.

Everything that can fail for a reason the user controls fails in `prepare`, before the first step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from .. import KDLoss, files
from ..cache import Head
from . import preflight
from .checkpoint import Checkpoints, load_model_tensors, model_tensors
from .config import DistillConfig, check_config, to_yaml
from .data import Rows, find_files, load_rows, rows_of_step, shifted_labels
from .evaluate import evaluate, evaluate_teacher
from .heads import find_head
from .metrics import MetricsLog, progress_bar, read_metrics
from .objective import Answer, ask_student, distillation_loss
from .student import build_student
from .teacher import Teacher
from .teacher_source import TeacherSource, describe_teacher


@dataclass
class Run:
    """What the loop works with."""

    config: DistillConfig
    out: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    head: Head | None  # the student's, which the loss applies; None: its logits are not its head's
    teacher: Teacher | None  # None: hard labels only and nothing to evaluate
    train_rows: Rows
    eval_rows: Rows | None
    total_steps: int
    optimizer: Any  # accelerate's wrapper around AdamW
    scheduler: torch.optim.lr_scheduler.LRScheduler
    checkpoints: Checkpoints


@dataclass
class Outcome:
    """What a finished run left: the saved student, the step its weights are from, and its held-out figures there."""

    student_path: Path
    metrics_path: Path
    step: int
    total_steps: int
    held_out: dict[str, float] | None


def distill(config: DistillConfig, console: Console | None = None) -> Outcome:
    """Run a distillation from its configuration to a saved student.

    Args:
        config: see :class:`fastkd.trainer.config.DistillConfig`.
        console: where progress goes; standard error by default.

    Raises:
        ValueError: before the first step, for settings, files, tokenizers, vocabularies, too little text or too
            little disk; the message names what came and what is allowed.
        RuntimeError: a loss that is not finite.
    """
    console = console or Console(stderr=True)
    with progress_bar(console) as progress:
        run = prepare(config, progress)
        outcome = train(run, progress, console)
    return outcome


def prepare(config: DistillConfig, progress: Progress) -> Run:
    """Check everything, then load everything. The order is: what is cheap to refuse first."""
    check_config(config)
    KDLoss(**dataclasses.asdict(config.loss))  # checks the options
    accelerator = preflight.make_accelerator(config.precision, config.device)
    for name, sources in [("data.train", config.data.train), ("data.eval", config.data.eval)]:
        find_files(name, sources)
    source = TeacherSource(config, accelerator)
    tokenizer = source.tokenizer
    preflight.check_student_source(config, tokenizer, source.vocab_size)
    out = preflight.open_output(config)
    train_rows = load_rows("data.train", config.data, tokenizer, config.seed)
    eval_rows = load_rows("data.eval", config.data, tokenizer, config.seed) if config.data.eval else None
    total_steps = preflight.count_steps(config, len(train_rows))

    source.load(train_rows, eval_rows, out)
    set_seed(config.seed)
    student = build_student(config.student, source.model, train_rows.input_ids)
    student = student.to(accelerator.device).train()
    preflight.check_disk(config, out, student, source.predicted())
    source.check(student.config.get_text_config().vocab_size, progress)
    head = find_head(student, train_rows.input_ids[:1].to(accelerator.device))

    optimizer, scheduler = make_optimizer(config, student, total_steps)
    files.write_text(out / "config.yaml", to_yaml(config))  # from here on the folder is a run
    return Run(
        config, out, accelerator, tokenizer, student, head, source.teacher(progress), train_rows, eval_rows,
        total_steps, accelerator.prepare(optimizer), scheduler,
        Checkpoints(out / "checkpoints", config.keep_checkpoints),
    )  # fmt: skip


def train(run: Run, progress: Progress, console: Console) -> Outcome:
    """From the last checkpoint, or the start, to the saved student."""
    config = run.config
    restored = run.checkpoints.restore(run.student, run.optimizer.optimizer, run.scheduler, run.accelerator)
    first = restored["step"] if restored else 0
    best: dict[str, Any] = restored["progress"] if restored else {}
    log = MetricsLog(run.out / "metrics.jsonl", first if restored else -1)
    if restored:
        console.print(f"resumed after step {first} of {run.total_steps}", highlight=False)
    else:
        files.remove_folder(run.out / "student")
        best = evaluate_and_log(run, 0, best, log, console)

    task = progress.add_task("distilling", total=run.total_steps, completed=first, loss="", speed="")
    tokens, seconds = 0, 0.0  # since the last line of the log, without evaluations and checkpoints
    for step in range(first + 1, run.total_steps + 1):
        began = time.perf_counter()
        logged = step % config.log_every == 0 or step == run.total_steps
        figures = train_step(run, step, logged)
        tokens += config.optim.rows_per_batch * config.optim.accumulation * config.data.seq_len
        seconds += time.perf_counter() - began
        progress.advance(task)
        if logged:
            speed = tokens / seconds
            log.write("train", step, **figures, tokens_per_s=round(speed, 1))
            progress.update(task, loss=f"loss {figures['loss']:.4f}", speed=f"{speed:,.0f} tokens/s")
            tokens, seconds = 0, 0.0
        if step == run.total_steps or (config.eval_every and step % config.eval_every == 0):
            best = evaluate_and_log(run, step, best, log, console)
        if config.checkpoint_every and (step % config.checkpoint_every == 0 or step == run.total_steps):
            run.checkpoints.save(step, run.student, run.optimizer.optimizer, run.scheduler, run.accelerator, best)
    log.close()
    return finish(run, best)


def train_step(run: Run, step: int, logged: bool) -> dict[str, Any]:
    """One optimizer step; the figures of the step if they are ``logged``, else an empty dict."""
    optim = run.config.optim
    indices = rows_of_step(step - 1, len(run.train_rows), optim.rows_per_batch * optim.accumulation, run.config.seed)
    predictions = len(indices) * (run.config.data.seq_len - 1)  # of the whole step: the mean is over all of its passes
    sums = torch.zeros(3, dtype=torch.float64)  # loss, divergence, cross-entropy
    for part in indices.split(optim.rows_per_batch):
        loss, stats = forward(run, part, predictions, logged)
        run.accelerator.backward(loss)
        if logged:
            assert stats is not None
            sums += torch.stack([loss.detach(), stats.kd.sum() / predictions, stats.ce.sum() / predictions]).cpu()
    trained = [p for p in run.student.parameters() if p.requires_grad]
    norm = run.accelerator.clip_grad_norm_(trained, optim.clip_norm or float("inf"))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if not run.optimizer.step_was_skipped:  # fp16: a gradient overflowed and the loss scale was lowered
        run.scheduler.step()
    if not logged:
        return {}
    mean_loss, kd, ce = sums.tolist()
    if not math.isfinite(mean_loss):
        raise RuntimeError(f"the loss is {mean_loss} at step {step}; lower optim.lr, or use precision=fp32")
    # With hard labels alone there is no second model, and its divergence from itself says nothing.
    divergence = kd if run.config.loss.kd_weight != 0 else None
    lr = run.optimizer.param_groups[0]["lr"]
    return {"loss": mean_loss, "kd": divergence, "ce": ce, "grad_norm": float(norm), "next_lr": lr}


def forward(run: Run, indices: Tensor, predictions: int, with_stats: bool) -> tuple[Tensor, Any]:
    """Loss of one pass over the rows ``indices`` as its share of the step's mean, and fastkd's per-token stats."""
    input_ids = run.train_rows.input_ids[indices].to(run.accelerator.device)
    teaches = run.config.loss.kd_weight != 0
    takes_hidden = teaches and run.teacher is not None and run.teacher.takes_hidden
    student = ask_student(run.student, run.head if takes_hidden else None, input_ids, run.accelerator)
    if teaches:
        assert run.teacher is not None
        teacher = run.teacher.batch("train", indices, input_ids)
    else:
        assert student.logits is not None
        teacher = Answer(logits=student.logits.detach())  # of weight 0
    # Position i predicts token i + 1: the labels are shifted, not the logits, so that no copy of them is made; the
    # last position of a row has no label and is skipped.
    return distillation_loss(
        student, teacher, shifted_labels(input_ids), run.accelerator, num_items=predictions, with_stats=with_stats,
        **dataclasses.asdict(run.config.loss),
    )  # fmt: skip


def evaluate_and_log(run: Run, step: int, best: dict[str, Any], log: MetricsLog, console: Console) -> dict[str, Any]:
    """Evaluate if there is held-out text; the best evaluation so far, whose weights are kept if they are wanted."""
    if run.eval_rows is None:
        return best
    assert run.teacher is not None
    batch, vocab = run.config.optim.rows_per_batch, run.config.loss.vocab
    means = evaluate(run.student, run.head, run.teacher, run.eval_rows, "eval", run.accelerator, batch, vocab).means()
    teacher: dict[str, float] = {}
    if step == 0:
        own = evaluate_teacher(run.teacher, run.eval_rows, "eval", run.accelerator, batch)
        teacher = {} if own is None else {"teacher_nll": own.nll.mean().item()}
    log.write("eval", step, **means, **teacher)
    console.print(
        f"step {step:>6}  held-out nll {means['nll']:.4f}  KL {means['kl']:.4f}  top-1 {means['agreement']:.4f}",
        highlight=False,
    )
    if "nll" in best and not means["nll"] < best["nll"]:
        return {**best, "last": means}
    if run.config.select == "best":
        files.write_tensors(run.out / "best.safetensors", model_tensors(run.student))
    return {"step": step, "nll": means["nll"], "held_out": means, "last": means}


def finish(run: Run, best: dict[str, Any]) -> Outcome:
    """Save the chosen student as a Hugging Face checkpoint, and the curves."""
    from .plot import plot_metrics  # matplotlib takes a second to import and only the end needs it

    step, held_out = run.total_steps, best.get("last")
    if run.config.select == "best":
        step, held_out = best["step"], best["held_out"]

    def fill(folder: Path) -> None:
        if run.config.select == "best":
            load_model_tensors(run.student, run.out / "best.safetensors")
        run.student.eval().requires_grad_(True).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    if not (run.out / "student").exists():  # a run that is resumed at its very end may have saved it already
        files.write_folder(run.out / "student", fill)
    (run.out / "best.safetensors").unlink(missing_ok=True)
    metrics_path = run.out / "metrics.jsonl"
    plot_metrics(
        read_metrics(metrics_path),
        run.out / "curves.png",
        f"distillation of {describe_teacher(run.config.teacher)}",
    )
    return Outcome(run.out / "student", metrics_path, step, run.total_steps, held_out)


def make_optimizer(
    config: DistillConfig, student: PreTrainedModel, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what is trained, and its schedule."""
    optim = config.optim
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel on the CPU, whose default walks through each tensor ten times. A scaler (fp16) would divide inside of
    # it, after the clipping.
    fused = True if student.device.type == "cpu" and config.precision != "fp16" else None
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=fused)
    try:
        scheduler = get_scheduler(
            optim.schedule,
            optimizer,
            round(optim.warmup_ratio * total_steps),
            total_steps,
            optim.schedule_options,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"optim.schedule={optim.schedule!r} with {optim.schedule_options}: {error}") from None
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"optim.schedule={optim.schedule!r}; allowed: a schedule that depends on the step alone")
    return optimizer, scheduler
