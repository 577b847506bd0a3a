"""Loading teachers and tokenizers, and the checks that two models speak the same vocabulary."""

from __future__ import annotations

import copy
import platform
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..cache.fingerprint import PROBE


def _location(argument: str, path: str) -> tuple[str, dict[str, Any]]:
    """Folder and keyword arguments of ``from_pretrained`` for a checkpoint folder or a GGUF file."""
    place = Path(path)
    if place.is_file() and place.suffix == ".gguf":
        return str(place.parent), {"gguf_file": place.name}
    if place.is_dir() and (place / "config.json").is_file():
        return str(place), {}
    allowed = "a folder with config.json, or a .gguf file (download a model first: hf download NAME --local-dir FOLDER)"
    state = "has no config.json" if place.is_dir() else "is not a .gguf file" if place.exists() else "does not exist"
    raise ValueError(f"{argument}={path!r} {state}; allowed: {allowed}")


def load_model(argument: str, path: str) -> PreTrainedModel:
    """A causal language model in fp32 from a checkpoint folder or a GGUF file (dequantised).

    Args:
        argument: the setting that named it, for the message.
        path: where it lies.

    Raises:
        ValueError: the path holds no model that transformers can load.
    """
    folder, keywords = _location(argument, path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **keywords)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{argument}={path!r} cannot be loaded as a causal language model: {error}") from None
    return _as_plain(model) if keywords else model


def _as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not believe to be quantised and can therefore be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain.eval()


def load_tokenizer(argument: str, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or alone in a folder.

    Raises:
        ValueError: there is none.
    """
    alone = (Path(path) / "tokenizer_config.json").is_file()
    folder, keywords = (path, {}) if alone else _location(argument, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **keywords)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{argument}={path!r} has no tokenizer that can be loaded: {error}") from None
    if keywords:
        _split_digits_as_gguf_says(tokenizer, path)
    return tokenizer


def _split_digits_as_gguf_says(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """transformers 5 ignores ``tokenizer.ggml.pre`` of a GGUF; for ``smollm`` that loses the rule that every digit is
    a token of its own, and about 1 token in 40,000 comes out different from what the model was trained on."""
    from gguf import GGUFReader

    pre = GGUFReader(path).get_field("tokenizer.ggml.pre")
    backend = tokenizer.backend_tokenizer
    if pre is not None and pre.contents() == "smollm" and "Digits" not in repr(backend.pre_tokenizer):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _text_config(argument: str, path: str) -> Any:
    """The text part of a model's configuration, without loading the weights."""
    folder, keywords = _location(argument, path)
    return AutoConfig.from_pretrained(folder, local_files_only=True, **keywords).get_text_config()


def vocab_size_of(argument: str, path: str) -> int:
    """Columns of a model's head according to its configuration.

    Raises:
        ValueError: the path holds no model.
    """
    return int(_text_config(argument, path).vocab_size)


def depth_of(argument: str, path: str) -> int:
    """Number of a model's blocks according to its configuration.

    Raises:
        ValueError: the path holds no model.
    """
    return int(_text_config(argument, path).num_hidden_layers)


def has_tokenizer(path: str) -> bool:
    """Whether a checkpoint folder brings a tokenizer of its own."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return path.endswith(".gguf") or any((Path(path) / name).is_file() for name in names)


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Refuse a student whose token ids mean something else.

    Raises:
        ValueError: naming tokens that differ, or how a probe text is cut differently.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours != theirs:
        names = sorted(ours.keys() | theirs.keys())
        differing = [n for n in names if ours.get(n) != theirs.get(n)]
        shown = ", ".join(f"{n!r}: teacher {ours.get(n)}, student {theirs.get(n)}" for n in differing[:3])
        raise ValueError(
            f"the teacher and student.path have different tokenizers: {len(ours)} and {len(theirs)} tokens, "
            f"{len(differing)} of them differ ({shown}); allowed: a student with the teacher's tokenizer"
        )
    cut = [t(PROBE, add_special_tokens=False)["input_ids"] for t in (teacher, student)]
    if cut[0] != cut[1]:
        raise ValueError(
            "the teacher and student.path have the same tokens but cut text differently: "
            f"{PROBE[:24]!r}... becomes {len(cut[0])} tokens and {len(cut[1])}; allowed: the teacher's tokenizer"
        )


def check_vocab_size(teacher_size: int, student_size: int, tokenizer_size: int, vocab: str) -> None:
    """Refuse heads that do not fit one another or the tokenizer.

    Args:
        teacher_size, student_size: columns of the logits.
        tokenizer_size: the highest token id that text can produce, plus 1.
        vocab: ``loss.vocab``.

    Raises:
        ValueError: naming the sizes.
    """
    if teacher_size != student_size and vocab == "error":
        raise ValueError(
            f"the student's head has {student_size} columns and the teacher's {teacher_size}; allowed: the same "
            "number, or loss.vocab=truncate if the extra columns of one are padding"
        )
    smallest = min(teacher_size, student_size)
    if tokenizer_size > smallest:
        raise ValueError(
            f"the tokenizer produces ids up to {tokenizer_size - 1} and the smaller head has {smallest} columns; "
            "allowed: heads that cover every token"
        )


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native on the device, so that it is faster than fp32 and not an emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.system() == "Linux":
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
        return bool(flags & {"avx512_bf16", "amx_bf16"} or ({"bf16", "asimd"} <= flags))
    return False


def pick_precision(precision: str, device: torch.device) -> str:
    """``auto`` resolved for the device: ``bf16`` where it is fast, else ``fp32``."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) else "fp32"
