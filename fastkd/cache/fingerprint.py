"""Fingerprints and checksums: xxh3 of 128 bits, which runs at the speed of the memory.

They are there for what happens by accident (a bit that flipped, a file that was cut off, another checkpoint in the same
folder), not against somebody who wants two files to agree. That would take a cryptographic hash: blake2b is eight times
slower, and a cache is verified no faster than it is hashed. datasets brings xxhash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

# Code, digits, other scripts, what looks like special tokens, and plain words: where tokenizers part company.
PROBE = (
    "The teacher and the student of this row read the same words. "
    "def f(x):\n\treturn x ** 2  # naïve, 12 345, 你好 🙂 <|im_start|></s>\n\n    It's 3.14!"
)
_PIECE = 1 << 24  # bytes of a file hashed at a time
# of a configuration: where it lay and who wrote it, not what the model computes
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}


def checksum(data: bytes | memoryview) -> str:
    """Of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_file(path: Path) -> str:
    """Of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_PIECE)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def data_fingerprint(input_ids: Tensor) -> str:
    """Of packed token ids ``(R, S)``, whatever their integer dtype."""
    digest = xxhash.xxh3_128(str(tuple(input_ids.shape)).encode())
    digest.update(np.ascontiguousarray(input_ids.cpu().numpy().astype("<i8")).data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of every token with its id, and of how a probe text is cut. That the text at hand is cut the same way is what
    the fingerprint of the data says."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return checksum(json.dumps([vocabulary, list(probe), tokenizer.eos_token_id]).encode())


def model_fingerprint(path: str | Path) -> str:
    """Of a checkpoint folder or a file: the configuration, and every byte of every weight, by name. Reading them is
    what it costs, and loading the model reads them too; in how many files they lie does not matter.

    Raises:
        ValueError: there are no weights.
    """
    place = Path(path)
    if place.is_file():
        return checksum_file(place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    parts = {"config": checksum(json.dumps(_lasting(config), sort_keys=True).encode())}
    for file in sorted(place.glob("*.safetensors")):
        parts.update(_tensor_checksums(file))
    if len(parts) == 1:
        parts |= {file.name: checksum_file(file) for file in sorted(place.glob("*.bin"))}
    if len(parts) == 1:
        raise ValueError(f"{str(place)!r} has no weights; allowed: a folder with .safetensors or .bin files")
    return checksum(json.dumps(parts, sort_keys=True).encode())


def _lasting(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _lasting(value) for key, value in tree.items() if key not in _VOLATILE}
    return tree


def _tensor_checksums(file: Path) -> dict[str, str]:
    """Name -> checksum of dtype, shape and bytes."""
    found = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
            tensor = tensors.get_tensor(name)
            digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()
    return found
