"""Where sparse teachers come from: logits, hidden states and a head, or a server that returns log-probabilities."""

from .dense import sample_from_hidden, sample_from_logits, topk_from_hidden, topk_from_logits
from .endpoint import fetch_teachers
from .responses import stack_teachers, teacher_from_response

__all__ = [
    "fetch_teachers",
    "sample_from_hidden",
    "sample_from_logits",
    "stack_teachers",
    "teacher_from_response",
    "topk_from_hidden",
    "topk_from_logits",
]
