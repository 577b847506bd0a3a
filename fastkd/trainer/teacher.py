"""The frozen teacher: logits for rows, from its body every time or from last hidden states kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .. import files
from .data import Rows

SHARD_ROWS = 256


def hidden_bytes(model: PreTrainedModel, rows: int, seq_len: int) -> int:
    """Size on disk of the cached hidden states of ``rows`` rows, fp16."""
    return rows * seq_len * model.config.get_text_config().hidden_size * 2


class Teacher:
    """Frozen model that gives logits for the rows of named splits.

    Args:
        model: the teacher, on the accelerator's device.
        accelerator: gives the precision.
        folder: where hidden states are kept; None runs the body every time.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, folder: Path | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.accelerator = accelerator
        self.folder = folder
        self._shards: dict[str, list[Path]] = {}

    def cache(self, split: str, rows: Rows, batch: int, progress: Progress) -> None:
        """Compute the hidden states of a split once, ``batch`` rows at a time; shards already there are kept.

        Raises:
            ValueError: the model does more to its logits than the head, or has hidden states beyond fp16.
        """
        if self.folder is None:
            return
        self._check_head_is_all(rows.input_ids[:1])
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_parts(self.folder)
        task = progress.add_task(f"teacher's hidden states, {split}", total=len(rows), loss="", speed="")
        paths = []
        for start in range(0, len(rows), SHARD_ROWS):
            ids = rows.input_ids[start : start + SHARD_ROWS]
            key = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
            paths.append(self.folder / f"{split}-{start:08d}-{key}.safetensors")
            if not paths[-1].exists():
                files.write_tensors(paths[-1], {"hidden": self._hidden_of(ids, batch, progress, task)})
            progress.update(task, completed=start + len(ids))
        self._shards[split] = paths

    def _hidden_of(self, ids: Tensor, batch: int, progress: Progress, task: object) -> Tensor:
        """``(R, S, H)`` fp16."""
        pieces = []
        for piece in ids.split(batch):
            pieces.append(self._hidden(piece.to(self.accelerator.device)).to("cpu", torch.float16))
            progress.advance(task, len(piece))  # type: ignore[arg-type]
        hidden = torch.cat(pieces)
        if not torch.isfinite(hidden).all():
            raise ValueError("the teacher's hidden states do not fit fp16; allowed: teacher.cache_hidden=false")
        return hidden

    @torch.no_grad()
    def _hidden(self, input_ids: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _check_head_is_all(self, input_ids: Tensor) -> None:
        """Some architectures scale or cap their logits after the head; a cache of hidden states would lose that."""
        ids = input_ids.to(self.accelerator.device)
        whole = self.model(input_ids=ids, use_cache=False).logits
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.allclose(whole, self.model.get_output_embeddings()(hidden), rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"teacher.cache_hidden=true does not fit {type(self.model).__name__}, which changes its logits after "
                "the head; allowed: teacher.cache_hidden=false"
            )

    @torch.no_grad()
    def logits(self, split: str, indices: Tensor, input_ids: Tensor) -> Tensor:
        """``(B, S, V)`` logits.

        Args:
            split: name given to :meth:`cache`; one that was never cached runs the body.
            indices: ``(B,)`` rows of the split.
            input_ids: ``(B, S)`` their tokens, on the device.
        """
        if split not in self._shards:
            with self.accelerator.autocast():
                return self.model(input_ids=input_ids, use_cache=False).logits
        head = self.model.get_output_embeddings()
        # Outside autocast, whose torch.stack refuses fp16 on the CPU.
        hidden = torch.stack([self._read(split, int(i)) for i in indices])
        with self.accelerator.autocast():
            return head(hidden.to(input_ids.device, head.weight.dtype))

    def _read(self, split: str, row: int) -> Tensor:
        """``(S, H)`` of one row; the file is mapped, so only this row is read."""
        with safe_open(self._shards[split][row // SHARD_ROWS], framework="pt") as shard:
            return shard.get_slice("hidden")[row % SHARD_ROWS]
