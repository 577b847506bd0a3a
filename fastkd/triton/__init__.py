"""The Triton backend. Importing it imports triton and registers torch.ops.fastkd.triton_*, sparse teachers included;
fastkd.backends does so when logits on an accelerator, or the user, ask for it."""

from . import shard as shard  # registers its parts
from . import sparse as sparse  # registers its operators
from .ops import DEVICES

__all__ = ["DEVICES"]
