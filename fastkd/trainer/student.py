"""The student: from a path, from a configuration, or the teacher pruned in depth by block influence."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .config import StudentConfig
from .models import load_model


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's transformer blocks: the one ModuleList as long as ``config.num_hidden_layers``.

    Raises:
        ValueError: there is none, or more than one.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"student.keep_blocks needs one list of {depth} blocks in {type(model).__name__}; found {len(lists)}; "
            "allowed: student.path or student.config for this architecture"
        )
    return lists[0]


@torch.no_grad()
def block_influence(model: PreTrainedModel, rows: Tensor) -> list[float]:
    """How much each block changes the hidden state: 1 - mean cosine between its input and output (ShortGPT,
    arXiv:2403.03853, equation 1).

    Args:
        model: in evaluation mode, on the device of ``rows``.
        rows: ``(R, S)`` int64 token ids.

    Returns:
        One number a block, about 0 (does nothing) to 2.
    """
    _, blocks = find_blocks(model)
    sums = [0.0] * len(blocks)

    def hook(index: int) -> Any:
        def measure(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] += torch.cosine_similarity(before.float(), after.float(), dim=-1).sum().item()

        return measure

    handles = [b.register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for row in rows:
            model.base_model(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [1 - s / rows.numel() for s in sums]


def choose_blocks(influence: list[float], keep: int) -> list[int]:
    """The ``keep`` blocks that stay, in order. Blocks 0, 1 and the last always stay.

    Raises:
        ValueError: ``keep`` outside 3 ... depth - 1.
    """
    depth = len(influence)
    if not 3 <= keep < depth:
        raise ValueError(f"student.keep_blocks={keep}; allowed: 3 to {depth - 1} for a teacher of {depth} blocks")
    removable = sorted(range(2, depth - 1), key=lambda i: influence[i])
    removed = set(removable[: depth - keep])
    return [i for i in range(depth) if i not in removed]


def pruned_config(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    """The configuration with only the kept blocks, settings that come one a block included."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    depth = text.num_hidden_layers
    per_block = [name for name, value in vars(text).items() if isinstance(value, list) and len(value) == depth]
    # The number first: classes check that per-block lists have that length when they are set.
    text.num_hidden_layers = len(kept)
    for name in per_block:
        setattr(text, name, [getattr(config.get_text_config(), name)[i] for i in kept])
    return smaller


def prune_depth(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A new model that holds copies of the kept blocks and of everything outside the blocks."""
    prefix, _ = find_blocks(model)
    new_index = {old: new for new, old in enumerate(kept)}
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    state = {}
    for name, tensor in model.state_dict().items():
        match = pattern.match(name)
        if match and int(match[1]) not in new_index:
            continue
        state[pattern.sub(f"{prefix}.{new_index[int(match[1])]}.", name) if match else name] = tensor
    smaller = AutoModelForCausalLM.from_config(pruned_config(model.config, kept), dtype=model.dtype)
    smaller.load_state_dict(state)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def student_config(path: str) -> PretrainedConfig:
    """The architecture named by ``student.config``.

    Raises:
        ValueError: there is no such file, or transformers does not know it.
    """
    if not Path(path).exists():
        raise ValueError(f"student.config={path!r} does not exist; allowed: a config.json or a folder with one")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"student.config={path!r} is no configuration that transformers knows: {error}") from None


def build_student(config: StudentConfig, teacher: PreTrainedModel | None, rows: Tensor) -> PreTrainedModel:
    """The student before its first step, fp32.

    Args:
        config: exactly one source is set.
        teacher: needed for ``keep_blocks`` only.
        rows: ``(R, S)`` training rows; the first ``calibration_rows`` measure influence.
    """
    if config.path is not None:
        student = load_model("student.path", config.path)
    elif config.config is not None:
        student = AutoModelForCausalLM.from_config(student_config(config.config), dtype=torch.float32)
    else:
        assert teacher is not None and config.keep_blocks is not None
        influence = block_influence(teacher, rows[: config.calibration_rows].to(teacher.device))
        student = prune_depth(teacher, choose_blocks(influence, config.keep_blocks))
    if config.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
        student.get_output_embeddings().requires_grad_(False)
    return student
