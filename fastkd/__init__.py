"""fastkd: the knowledge-distillation loss at the cost of reading the logits once."""

from .backends import backends, explain
from .functional import kd_loss
from .linear import linear_kd_loss
from .modules import KDLoss, LinearKDLoss
from .stats import KDStats

__version__ = "0.1.0"
__all__ = [
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "__version__",
    "backends",
    "explain",
    "kd_loss",
    "linear_kd_loss",
]
