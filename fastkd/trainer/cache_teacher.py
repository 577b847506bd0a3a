"""fastkd cache-teacher: one pass of a teacher over a data set into a folder, for runs without the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..cache import CacheWriter, Spec, model_fingerprint, tokenizer_fingerprint
from . import command, models, preflight
from .config import DataConfig
from .data import find_files, load_rows
from .heads import find_head
from .metrics import progress_bar
from .teacher_pass import TeacherPass, plain_head, write


@dataclass
class SourceConfig:
    """The teacher.

    Args:
        path: folder of a Hugging Face checkpoint with its tokenizer, or a .gguf file.
    """

    path: str


@dataclass
class CacheConfig:
    """A cache.

    Args:
        teacher: the teacher.
        data: text for training and evaluation; each becomes a split. The settings must be those of the run.
        output_dir: the folder; one with a part of the same cache is gone on with.
        kind: hidden (final hidden states), topk (the k largest log-probabilities), sampled (k draws).
        k: entries a token of topk and sampled.
        dtype: of hidden states or log-probabilities; auto is float16 for the former and float32 for the latter.
        temperature: of the log-probabilities: that of the loss.
        proposal_temperature: of the distribution that is drawn from, where it is not the temperature.
        rows_per_batch: rows in one forward pass.
        shard_rows: rows in a file; default 128 MB of them, fewer where there are few.
        precision: fp32, bf16 or fp16 arithmetic; auto is bf16 where the device is fast in it, else fp32.
        device: auto, or cpu although there is an accelerator.
        seed: of the choice of rows, as in the run, and of the draws.
        repair: compare the checksums of what is there and make damaged shards again.
    """

    teacher: SourceConfig
    data: DataConfig
    output_dir: str
    kind: Literal["hidden", "topk", "sampled"] = "hidden"
    k: int = 64
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    temperature: float = 1.0
    proposal_temperature: float | None = None
    rows_per_batch: int = 4
    shard_rows: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    repair: bool = False


def check_cache_config(config: CacheConfig) -> None:
    """Refuse values that no cache can use.

    Raises:
        ValueError: naming the setting, what came and what is allowed.
    """
    for name, least in (("k", 1), ("rows_per_batch", 1), ("shard_rows", 1), ("seed", 0)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value!r}; allowed: at least {least}")
    if config.data.seq_len < 2:
        raise ValueError(f"data.seq_len={config.data.seq_len!r}; allowed: at least 2")
    for name in ("temperature", "proposal_temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}; allowed: a positive number")
    if config.kind == "hidden" and config.temperature != 1:
        raise ValueError(f"temperature={config.temperature!r} with kind='hidden'; allowed: 1, since hidden states are "
                         "good for every temperature")  # fmt: skip
    if config.kind != "sampled" and config.proposal_temperature is not None:
        raise ValueError(f"proposal_temperature={config.proposal_temperature!r} with kind={config.kind!r}; allowed: "
                         "with kind='sampled'")  # fmt: skip
    if config.proposal_temperature == config.temperature:
        config.proposal_temperature = None  # the draws are of the teacher itself, and weigh the same


def make_spec(config: CacheConfig, model: str, tokenizer: str, sizes: tuple[int, int], precision: str) -> Spec:
    """What the configuration asks for. ``sizes``: H and V of the teacher; ``model``, ``tokenizer``: fingerprints."""
    hidden = config.kind == "hidden"
    dtype = config.dtype if config.dtype != "auto" else "float16" if hidden else "float32"
    return Spec(
        config.kind, dtype, sizes[0] if hidden else config.k, sizes[1], model, tokenizer, precision,
        config.temperature, config.proposal_temperature, config.seed,
    )  # fmt: skip


def cache_teacher(config: CacheConfig, console: Console) -> Path:
    """Run ``fastkd cache-teacher`` from its configuration to the finished folder.

    Raises:
        ValueError: settings, files, models or disks that do not fit; the message names what came and what is allowed.
    """
    check_cache_config(config)
    accelerator = preflight.make_accelerator(config.precision, config.device, several=True)
    for name, sources in [("data.train", config.data.train), ("data.eval", config.data.eval)]:
        find_files(name, sources)
    tokenizer = models.load_tokenizer("teacher.path", config.teacher.path)
    rows = {"train": load_rows("data.train", config.data, tokenizer, config.seed).input_ids}
    if config.data.eval:
        rows["eval"] = load_rows("data.eval", config.data, tokenizer, config.seed).input_ids
    fingerprints = model_fingerprint(config.teacher.path), tokenizer_fingerprint(tokenizer)
    model = models.load_model("teacher.path", config.teacher.path).to(accelerator.device).eval().requires_grad_(False)
    head = find_head(model, rows["train"][:1].to(accelerator.device))
    if config.kind == "hidden":
        head = plain_head(model, rows["train"], "kind=hidden")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    vocab_size = head.weight.shape[0] if head else model.config.get_text_config().vocab_size
    sizes = (head.weight.shape[1] if head else 0, vocab_size)
    spec = make_spec(config, *fingerprints, sizes, precision)
    writer = CacheWriter(
        Path(config.output_dir),
        rows,
        spec,
        head=head if config.kind == "hidden" else None,
        shard_rows=config.shard_rows,
    )
    quiet = not accelerator.is_main_process
    if not quiet:
        describe(writer, console)
    teacher = TeacherPass(model, accelerator, spec, head, config.rows_per_batch)
    with progress_bar(Console(stderr=True, quiet=True) if quiet else console) as progress:
        write(writer, teacher, progress, tokenizer, config.repair)
    return writer.folder


def describe(writer: CacheWriter, console: Console) -> None:
    """What will be written, before it is."""
    spec, sizes = writer.spec, writer.predicted()
    of = {"hidden": f"hidden states of {spec.width}", "topk": f"top {spec.width}", "sampled": f"{spec.width} draws"}
    console.print(f"{of[spec.kind]}, {spec.dtype}, {spec.precision} arithmetic", highlight=False)
    for name, size in sizes.items():
        split = writer.index.splits.get(name)
        rows = f": {split.rows:,} rows of {split.seq_len} tokens in {split.count} shards" if split else ""
        console.print(f"  {name}{rows}, {size / 1e6:,.1f} MB", highlight=False)
    console.print(f"  {sum(sizes.values()) / 1e6:,.1f} MB in all, into {writer.folder}", highlight=False)


def main(argv: Sequence[str]) -> int:
    """Run ``fastkd cache-teacher``; the exit status: 0 done, 1 an error that was explained, 130 interrupted."""
    config = command.parse(CacheConfig, "fastkd cache-teacher", "Keep a teacher's answers on disk.", argv)

    def work(console: Console) -> None:
        console.print(f"teacher cache: {cache_teacher(config, console)}", highlight=False)

    return command.run("fastkd cache-teacher", work, "interrupted; the same command goes on after the last whole shard")
