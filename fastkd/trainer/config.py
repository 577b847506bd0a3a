"""The typed configuration of a distillation run: defaults, file and flags, and the checks that need no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .command import parse

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass
class TeacherConfig:
    """The frozen teacher: a model (path), what a cache has of one (cache), or a server (url).

    Args:
        path: folder of a Hugging Face checkpoint with its tokenizer, or a .gguf file. Beside cache: that the cache must
            be of. Beside url: whose tokenizer the server speaks; default that of student.path.
        cache: folder that fastkd cache-teacher wrote from the same data, settings of data and seed.
        url: of a server with vLLM's or SGLang's log-probabilities of prompts, without a path.
        server: vllm or sglang: how it is asked.
        model: name of the served model, for vllm.
        k: log-probabilities a position to ask for.
        timeout: seconds a request may take.
        tail: bucket or renormalize: what the columns are that neither a cache of kind topk nor a server names.
        cache_hidden: with path alone, run the body once over every row, keep its last hidden states on disk (fp16) and
            apply only the head in each epoch; pays off from the second epoch on.
    """

    path: str | None = None
    cache: str | None = None
    url: str | None = None
    server: Literal["vllm", "sglang"] = "vllm"
    model: str | None = None
    k: int = 20
    timeout: float = 120.0
    tail: Literal["bucket", "renormalize"] = "bucket"
    cache_hidden: bool = False


@dataclass
class StudentConfig:
    """Where the student comes from: exactly one of path, config and keep_blocks.

    Args:
        path: folder of a Hugging Face checkpoint to start from.
        config: folder or config.json of an architecture to initialise at random.
        keep_blocks: prune the teacher in depth to this many blocks, the least influential ones first.
        calibration_rows: training rows that measure the influence of the teacher's blocks.
        freeze_embeddings: do not train the input embedding and the output head.
    """

    path: str | None = None
    config: str | None = None
    keep_blocks: int | None = None
    calibration_rows: int = 16
    freeze_embeddings: bool = False


@dataclass
class DataConfig:
    """Text for training and for held-out evaluation, packed into rows of seq_len tokens.

    Args:
        train: text files (one document each), .jsonl files, folders written by datasets.save_to_disk, glob patterns.
        eval: the same for held-out evaluation; empty for none.
        text_field: field or column of jsonl and saved datasets that holds the text. A saved dataset with a column
            input_ids is taken as tokenized.
        seq_len: tokens in a row; a row trains seq_len - 1 predictions.
        cross_documents: let a row run over the end of a document (joined by the end-of-text token); otherwise what
            is left of a document after its last whole row is dropped.
        max_train_rows: keep this many rows at most, drawn in turn from every document.
        max_eval_rows: the same for evaluation.
    """

    train: str | list[str]
    eval: str | list[str] = field(default_factory=list)
    text_field: str = "text"
    seq_len: int = 1024
    cross_documents: bool = True
    max_train_rows: int | None = None
    max_eval_rows: int | None = None


@dataclass
class LossConfig:
    """The loss; every field is the keyword of the same name of fastkd.kd_loss, where its meaning and range stand.

    Args:
        divergence: forward_kl, reverse_kl, symmetric_kl, jsd, total_variation, skew_forward_kl or skew_reverse_kl.
        beta: weight inside jsd, the skew divergences and symmetric_kl.
        temperature: divides the logits of both models in the divergence.
        scale_by_t2: multiply the divergence by the square of the temperature.
        kd_weight: weight of the divergence; 0 trains on hard labels alone and does not run the teacher for it.
        ce_weight: weight of the cross-entropy with the next token.
        label_smoothing: of the cross-entropy.
        z_loss: of the cross-entropy.
        vocab: error, or truncate for heads padded to different sizes.
        backend: auto, native or eager.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    scale_by_t2: bool = True
    kd_weight: float = 0.5
    ce_weight: float = 0.5
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    vocab: Literal["error", "truncate"] = "error"
    backend: Literal["auto", "native", "eager"] = "auto"


@dataclass
class OptimConfig:
    """AdamW and its schedule. One step sees rows_per_batch * accumulation rows.

    Args:
        lr: peak learning rate.
        weight_decay: of matrices; vectors (norms, biases) are not decayed.
        beta1: decay of AdamW's first moment.
        beta2: decay of AdamW's second moment.
        rows_per_batch: rows in one forward and backward pass.
        accumulation: passes in one optimizer step.
        epochs: passes over the training rows.
        max_steps: stop the schedule at this many steps instead.
        warmup_ratio: share of all steps with a rising learning rate.
        schedule: name for transformers.get_scheduler.
        schedule_options: its scheduler_specific_kwargs.
        clip_norm: largest gradient norm; 0 does not clip.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    rows_per_batch: int = 4
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    warmup_ratio: float = 0.1
    schedule: str = "cosine_with_min_lr"
    schedule_options: dict[str, Any] = field(default_factory=lambda: {"min_lr_rate": 0.1})
    clip_norm: float = 1.0


@dataclass
class DistillConfig:
    """A distillation run.

    Args:
        teacher: the frozen teacher.
        student: where the student comes from.
        data: text for training and evaluation.
        output_dir: everything the run writes: config.yaml, metrics.jsonl, curves.png, checkpoints/, student/.
        loss: the loss.
        optim: optimizer and schedule.
        eval_every: optimizer steps between evaluations; 0 evaluates at the start and the end only.
        log_every: optimizer steps between two lines of metrics.jsonl.
        checkpoint_every: optimizer steps between checkpoints; 0 writes none.
        keep_checkpoints: older checkpoints beyond this number are removed.
        select: save the student of the last step, or of the evaluation with the best held-out nll.
        precision: fp32, bf16 or fp16 arithmetic; auto is bf16 where the device is fast in it, else fp32.
        device: auto, or cpu although there is an accelerator.
        seed: of the student's initialisation, the order of the rows and their choice.
        resume: continue the run in output_dir from its last checkpoint.
    """

    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    output_dir: str
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval_every: int = 200
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    select: Literal["last", "best"] = "last"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    resume: bool = False


def parse_config(argv: Sequence[str]) -> DistillConfig:
    """Read ``--config file.yaml`` and flags into a DistillConfig. Ends the process with a message on a bad one."""
    return parse(DistillConfig, "fastkd distill", "Distil a causal language model into a smaller one.", argv)


def to_dict(config: DistillConfig) -> dict[str, Any]:
    """Every setting with its value, ready for YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: DistillConfig) -> str:
    """The resolved configuration, readable by ``--config``."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differing_settings(config: DistillConfig, saved_yaml: str) -> list[str]:
    """Settings in which ``config`` differs from a saved one, as ``name: saved -> now``; ``resume`` does not count."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            nested = isinstance(value, dict) and key != "schedule_options"
            leaves.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
        return leaves

    saved, now = flat(yaml.safe_load(saved_yaml)), flat(to_dict(config))
    names = sorted((saved.keys() | now.keys()) - {"resume"})
    return [f"{n}: {saved.get(n)!r} -> {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]


def check_config(config: DistillConfig) -> None:
    """Refuse values that no run can use.

    Raises:
        ValueError: naming the setting, what came and what is allowed.
    """
    at_least = {
        "student.calibration_rows": (config.student.calibration_rows, 1),
        "data.seq_len": (config.data.seq_len, 2),
        "data.max_train_rows": (config.data.max_train_rows, 1),
        "data.max_eval_rows": (config.data.max_eval_rows, 1),
        "teacher.k": (config.teacher.k, 1),
        "optim.weight_decay": (config.optim.weight_decay, 0),
        "optim.rows_per_batch": (config.optim.rows_per_batch, 1),
        "optim.accumulation": (config.optim.accumulation, 1),
        "optim.epochs": (config.optim.epochs, 1),
        "optim.max_steps": (config.optim.max_steps, 1),
        "optim.clip_norm": (config.optim.clip_norm, 0),
        "eval_every": (config.eval_every, 0),
        "log_every": (config.log_every, 1),
        "checkpoint_every": (config.checkpoint_every, 0),
        "keep_checkpoints": (config.keep_checkpoints, 1),
        "seed": (config.seed, 0),
    }
    for name, (value, least) in at_least.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value!r}; allowed: at least {least}")
    if not 0 < config.optim.lr < float("inf"):
        raise ValueError(f"optim.lr={config.optim.lr!r}; allowed: a positive number")
    for name, share in [("warmup_ratio", config.optim.warmup_ratio), ("beta1", config.optim.beta1),
                        ("beta2", config.optim.beta2)]:  # fmt: skip
        if not 0 <= share < 1:
            raise ValueError(f"optim.{name}={share!r}; allowed: 0 <= {name} < 1")
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision={config.precision!r}; allowed: {', '.join(PRECISIONS)}")
    _check_sources(config)


def _check_sources(config: DistillConfig) -> None:
    """The settings that exclude or need one another."""
    _check_teacher_source(config)
    student = config.student
    sources = {"path": student.path, "config": student.config, "keep_blocks": student.keep_blocks}
    given = [f"student.{name}={value!r}" for name, value in sources.items() if value is not None]
    if len(given) != 1:
        came = ", ".join(given) or "none of them"
        raise ValueError(f"exactly one of student.path, student.config, student.keep_blocks is allowed; got {came}")
    if not config.data.train:
        raise ValueError(f"data.train={config.data.train!r}; allowed: at least one file, folder or pattern")
    if config.select == "best" and not config.data.eval:
        raise ValueError("select='best' needs held-out text; got data.eval=[]")
    if config.loss.kd_weight == 0 and config.loss.ce_weight == 0:
        raise ValueError("loss.kd_weight=0 and loss.ce_weight=0 leave nothing to learn; allowed: at least one not 0")
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; allowed: a folder, new or of a run to resume")


def _check_teacher_source(config: DistillConfig) -> None:
    teacher = config.teacher
    if teacher.cache is not None and teacher.url is not None:
        raise ValueError(f"teacher.cache={teacher.cache!r} and teacher.url={teacher.url!r}; allowed: one of them")
    if teacher.path is None and teacher.cache is None and teacher.url is None:
        raise ValueError("the teacher is one of teacher.path, teacher.cache and teacher.url; got none of them")
    if teacher.cache_hidden and (teacher.cache is not None or teacher.url is not None):
        raise ValueError("teacher.cache_hidden=true keeps the states of a model; allowed: with teacher.path alone")
    if config.student.keep_blocks is not None and teacher.path is None:
        raise ValueError("student.keep_blocks prunes the teacher's model; got teacher.path=None; allowed: its folder")
    if teacher.url is not None and teacher.path is None and config.student.path is None:
        raise ValueError("teacher.url needs the served model's tokenizer; allowed: its folder as teacher.path, or a "
                         "student.path that brings it")  # fmt: skip
    if teacher.url is not None and teacher.server == "vllm" and teacher.model is None:
        raise ValueError("teacher.server='vllm' needs teacher.model, the name of the served model; got None")
    if not 0 < teacher.timeout < float("inf"):
        raise ValueError(f"teacher.timeout={teacher.timeout!r}; allowed: a positive number")
