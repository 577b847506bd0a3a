"""What is checked before the first step, so that nothing fails after an hour that could be known at once."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator, PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import files
from . import models
from .checkpoint import checkpoint_bytes, model_tensors
from .config import DistillConfig, differing_settings
from .student import choose_blocks, student_config


def make_accelerator(precision: str, device: str, several: bool = False) -> Accelerator:
    """Device and precision; arguments as in the configuration.

    Raises:
        ValueError: started in several processes, unless ``several`` are allowed.
    """
    on_cpu = device == "cpu"
    state = PartialState(cpu=on_cpu)
    if state.num_processes > 1 and not several:
        raise ValueError(f"fastkd distill runs in one process; it was started in {state.num_processes}")
    precision = models.pick_precision(precision, state.device)
    return Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision)


def check_student_source(config: DistillConfig, tokenizer: PreTrainedTokenizerBase, teacher_size: int) -> None:
    """The student exists and speaks the teacher's vocabulary; reads configurations and tokenizers, no weights.

    Args:
        teacher_size: columns of the teacher's head.
    """
    student_size = teacher_size
    if config.student.path is not None:
        student_size = models.vocab_size_of("student.path", config.student.path)
        if models.has_tokenizer(config.student.path):
            models.check_same_tokenizer(tokenizer, models.load_tokenizer("student.path", config.student.path))
    elif config.student.config is not None:
        student_size = student_config(config.student.config).get_text_config().vocab_size
    else:
        assert config.student.keep_blocks is not None and config.teacher.path is not None
        choose_blocks([0.0] * models.depth_of("teacher.path", config.teacher.path), config.student.keep_blocks)
    models.check_vocab_size(teacher_size, student_size, max(tokenizer.get_vocab().values()) + 1, config.loss.vocab)


def open_output(config: DistillConfig) -> Path:
    """The output folder: new, or that of the same run to resume."""
    out = Path(config.output_dir)
    saved = out / "config.yaml"
    if saved.exists() and not config.resume:
        raise ValueError(f"output_dir={str(out)!r} holds a run already; allowed: --resume true, or another folder")
    if saved.exists():
        differing = differing_settings(config, saved.read_text(encoding="utf-8"))
        if differing:
            raise ValueError(f"resume=true needs the settings the run began with; differing: {'; '.join(differing)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.remove_parts(out)
        files.remove_parts(out / "checkpoints")
    except OSError as error:
        raise ValueError(f"output_dir={str(out)!r} cannot be written: {error}") from None
    return out


def count_steps(config: DistillConfig, rows: int) -> int:
    """Optimizer steps of the run.

    Raises:
        ValueError: fewer rows than one step takes.
    """
    per_step = config.optim.rows_per_batch * config.optim.accumulation
    if rows < per_step:
        raise ValueError(
            f"data.train gives {rows} rows of {config.data.seq_len} tokens and one step takes {per_step} "
            "(optim.rows_per_batch * optim.accumulation); allowed: more text, shorter rows or smaller steps"
        )
    return config.optim.max_steps or config.optim.epochs * (rows // per_step)


def predicted_sizes(config: DistillConfig, student: PreTrainedModel, cached: int) -> dict[str, int]:
    """Bytes of everything the run writes, at the worst moment; ``cached``: of a cache of its own."""
    weights = sum(t.numel() * t.element_size() for t in model_tensors(student).values())
    return {
        "checkpoints": checkpoint_bytes(student, config.keep_checkpoints) if config.checkpoint_every else 0,
        "best student": 2 * weights if config.select == "best" else 0,
        "final student": weights,
        "teacher's hidden states": cached,
        "tokenizer, metrics, curves": 32_000_000,
    }


def check_disk(config: DistillConfig, out: Path, student: PreTrainedModel, cached: int) -> None:
    """Refuse a run whose files will not fit; what ``out`` holds already counts towards them.

    Raises:
        ValueError: with the sizes.
    """
    needs = predicted_sizes(config, student, cached)
    present = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    total, free = sum(needs.values()) - present, shutil.disk_usage(out).free
    if total > free:
        parts = ", ".join(f"{what} {size / 1e6:,.1f} MB" for what, size in needs.items() if size)
        raise ValueError(
            f"output_dir={str(out)!r} has {free / 1e6:,.1f} MB free and the run needs {total / 1e6:,.1f} MB more "
            f"({parts}); allowed: a disk with more space, or fewer checkpoints (checkpoint_every, keep_checkpoints)"
        )
