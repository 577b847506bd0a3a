"""A teacher's answers on disk: hidden states, top-k or draws, written once and read in any order."""

from .fingerprint import data_fingerprint, model_fingerprint, tokenizer_fingerprint
from .format import Head, Spec
from .reader import CachedRows, TeacherCache
from .writer import CacheWriter

__all__ = [
    "CacheWriter",
    "CachedRows",
    "Head",
    "Spec",
    "TeacherCache",
    "data_fingerprint",
    "model_fingerprint",
    "tokenizer_fingerprint",
]
