"""A tiny teacher, its tokenizer and text, made on the spot: what the trainer's tests run on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastkd.trainer.config import (
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
)

SENTENCE = "the loss of a student is the distance from its teacher and every row of logits is read once"
WORDS = SENTENCE.split()


def text(seed: int, words: int) -> str:
    """Sentences in which each word depends on the one before, so that there is something to learn."""
    draw = random.Random(seed)
    state, out = 0, []
    for _ in range(words):
        state = (state * 3 + draw.choice([0, 1, 1, 1])) % len(WORDS)
        out.append(WORDS[state])
    return " ".join(out)


def make_tokenizer(folder: Path, vocab_size: int = 300, corpus: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the text above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus or text(0, 2000)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def make_model(
    folder: Path, blocks: int = 6, vocab_size: int = 300, hidden: int = 32, seed: int = 0, **more: Any
) -> Path:
    """A random Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.15, bos_token_id=None, eos_token_id=0, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_world(folder: Path) -> Path:
    """``teacher/`` with a tokenizer, ``train.txt`` and ``eval.txt`` in ``folder``."""
    make_model(folder / "teacher")
    make_tokenizer(folder / "teacher")
    (folder / "train.txt").write_text(text(1, 1500))
    (folder / "eval.txt").write_text(text(2, 300))
    return folder


def make_config(world: Path, out: Path, **changes: Any) -> DistillConfig:
    """A run of 12 steps over the tiny world. ``changes`` are settings by dotted name, dots as double
    underscores."""
    config = DistillConfig(
        teacher=TeacherConfig(str(world / "teacher")),
        student=StudentConfig(keep_blocks=4, calibration_rows=2),
        data=DataConfig(str(world / "train.txt"), str(world / "eval.txt"), seq_len=32, max_eval_rows=4),
        output_dir=str(out),
        loss=LossConfig(),
        optim=OptimConfig(lr=2e-3, rows_per_batch=2, accumulation=2, max_steps=12),
        eval_every=4,
        log_every=2,
        checkpoint_every=3,
        precision="fp32",
        device="cpu",
    )
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, leaf), name
        setattr(target, leaf, value)
    return config
