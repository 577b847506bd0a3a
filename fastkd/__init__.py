"""fastkd: the knowledge-distillation loss at the cost of reading the logits once."""

from .backends import backends, explain
from .functional import kd_loss
from .modules import KDLoss
from .stats import KDStats

__version__ = "0.1.0"
__all__ = ["KDLoss", "KDStats", "__version__", "backends", "explain", "kd_loss"]
