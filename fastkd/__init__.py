"""fastkd: the knowledge-distillation loss at the cost of reading the logits once."""

from .backends import backends, explain
from .functional import kd_loss
from .linear import linear_kd_loss
from .linear_sparse import linear_sparse_kd_loss
from .modules import KDLoss, LinearKDLoss, LinearSparseKDLoss
from .shard import VocabShard
from .sparse import SparseKDLoss, sparse_kd_loss
from .stats import KDStats
from .topk import TopKTeacher

__version__ = "0.1.0"
__all__ = [
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "LinearSparseKDLoss",
    "SparseKDLoss",
    "TopKTeacher",
    "VocabShard",
    "__version__",
    "backends",
    "explain",
    "kd_loss",
    "linear_kd_loss",
    "linear_sparse_kd_loss",
    "sparse_kd_loss",
]
