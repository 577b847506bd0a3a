"""The whole state of a run as safetensors and JSON: what is saved, what is restored, and how large it will be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import files


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (a tied one once) and persistent buffers by name."""
    persistent = model.state_dict().keys()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors.update({name: b for name, b in model.named_buffers() if name in persistent})
    return tensors


def load_model_tensors(model: torch.nn.Module, path: Path) -> None:
    """Copy a file written from :func:`model_tensors` (or a part of it) into the model."""
    current = model_tensors(model)
    for name, tensor in load_file(path).items():
        current[name].copy_(tensor)


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as ``parameter|slot``, for the parameters that have one."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{names[id(p)]}|{slot}": value for p, state in optimizer.state.items() for slot, value in state.items()}


def _restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    parameters = dict(model.named_parameters())
    for key, value in load_file(path).items():
        name, slot = key.rsplit("|", 1)
        # The step counter stays on the CPU, moments go where their parameter is; empty_like+copy aligns the memory
        # as a fresh optimizer's is, and a file mapped into memory is not.
        place = value if slot == "step" else parameters[name]
        optimizer.state[parameters[name]][slot] = torch.empty_like(value, device=place.device).copy_(value)


def _rng_tensors() -> dict[str, torch.Tensor]:
    """Every generator a model could draw from."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python_words": torch.tensor(words, dtype=torch.int64),
        "python_rest": torch.tensor([version, float("nan") if gauss_next is None else gauss_next], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["torch"].clone())
    position, has_gauss, gauss = tensors["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", tensors["numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    version, gauss_next = tensors["python_rest"].tolist()
    none_or_next = None if np.isnan(gauss_next) else gauss_next
    random.setstate((int(version), tuple(tensors["python_words"].tolist()), none_or_next))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[f"cuda{i}"].clone() for i in range(torch.cuda.device_count())])


class Checkpoints:
    """Numbered checkpoints in a folder; only whole ones are ever visible under their names.

    Args:
        folder: where they lie.
        keep: how many stay; older ones are removed after a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
        progress: dict[str, Any],
    ) -> None:
        """Write the state after ``step`` steps. ``progress`` is JSON: the trainer's own counters."""

        def fill(folder: Path) -> None:
            cpu = {name: t.cpu().contiguous() for name, t in model_tensors(model).items()}
            save_file(cpu, folder / "model.safetensors")
            moments = {name: t.cpu().contiguous() for name, t in _optimizer_tensors(model, optimizer).items()}
            save_file(moments, folder / "optimizer.safetensors")
            save_file(_rng_tensors(), folder / "rng.safetensors")
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            schedule = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            state = {
                "step": step,
                "groups": groups,
                "schedule": schedule,
                "scaler": scaler,
                "progress": progress,
            }
            (folder / "state.json").write_text(json.dumps(state, indent=1))

        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_folder(self.path(step), fill)
        self._remove_old()

    def _remove_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            files.remove_folder(self.path(old))

    def restore(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint into the objects; its ``{"step", "progress"}``, or None where there is none.

        Raises:
            ValueError: a checkpoint that was damaged after it was written, naming the file's folder.
        """
        if not self.steps():
            return None
        self._remove_old()  # a kill may have come between a new checkpoint and the removal of an old one
        folder = self.path(self.steps()[-1])
        try:
            state = json.loads((folder / "state.json").read_text())
            load_model_tensors(model, folder / "model.safetensors")
            _restore_optimizer(model, optimizer, folder / "optimizer.safetensors")
            rng = load_file(folder / "rng.safetensors")
        except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"checkpoint {folder} is damaged ({error}); remove that folder to use an older one"
            ) from None
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(saved, betas=tuple(saved["betas"]))
        # Its functions are not saved; they follow from the configuration and are there already.
        scheduler.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(state["groups"])})
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        _restore_rng(rng)
        return {"step": state["step"], "progress": state["progress"]}


def checkpoint_bytes(model: torch.nn.Module, checkpoints: int) -> int:
    """Bytes of ``checkpoints`` checkpoints and the one being written: the model, and two moments of what is trained."""
    weights = sum(t.numel() * t.element_size() for t in model_tensors(model).values())
    moments = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return (checkpoints + 1) * (weights + moments)
