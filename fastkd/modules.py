"""The loss as a module that holds its configuration."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import kd_loss
from .options import Options, check_options
from .stats import KDStats


class KDLoss(nn.Module):
    """:func:`fastkd.kd_loss` with its options fixed at construction.

    Takes the scalar keywords of :func:`fastkd.kd_loss` (``divergence`` ... ``backend``); the tensors and
    ``num_items_in_batch`` go to the call. ``module.options`` may be replaced during training
    (``module.options = module.options._replace(beta=0.3)``).

    Raises:
        TypeError, ValueError: an option outside its range; the message names it.
    """

    def __init__(self, **options) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(Options._fields))
        if unknown:
            raise TypeError(f"KDLoss got unknown options {unknown}; allowed: {', '.join(Options._fields)}")
        self.options = Options(**options)
        check_options(self.options)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | float | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """Shapes and errors as in :func:`fastkd.kd_loss`; ``temperature`` overrides the module's for this call."""
        keywords = self.options._asdict()
        if temperature is not None:
            keywords["temperature"] = temperature
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **keywords,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = Options()
        return ", ".join(
            f"{name}={value!r}" for name, value in self.options._asdict().items() if value != getattr(defaults, name)
        )
