"""The table's problems on another device: the same bytes at the same strides, results brought back."""

from __future__ import annotations

from typing import Any

import torch
from inputs import Outcome, run_backend
from test_loss import Problem
from torch import Tensor

from fastkd import KDStats


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy on ``device`` with everything that lies between its rows: Tensor.to would close the gaps."""
    length = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.as_strided(x.detach(), (length,), (1,), 0).to(device, copy=True)
    return torch.as_strided(memory, x.shape, x.stride(), x.storage_offset())


def run_on(problem: Problem, device: torch.device | str, **overrides: Any) -> Outcome:
    """As Problem.run, on ``device``."""
    inputs = problem.inputs._replace(
        student_base=moved(problem.inputs.student_base, device), teacher=moved(problem.inputs.teacher, device)
    )
    options = {**problem.options, **overrides}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    upstream = None if problem.upstream is None else problem.upstream.to(device)
    loss, gradient, stats = run_backend(inputs, options, upstream=upstream)
    assert gradient is not None and loss.device.type == torch.device(device).type
    return Outcome(loss.cpu(), gradient.cpu(), None if stats is None else KDStats(*(x.cpu() for x in stats)))
