"""What fastkd/triton/specialisations.py lists, as Triton's launcher would ask for it and compile it (triton_driver)."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction
from triton_driver import OPTIONS, TARGETS, Key, by_name, compile_for

from fastkd.triton import ends, kernels, specialisations
from fastkd.triton.specialisations import Specialisation

LOGITS = {"student": 0, "source": 0, "scaled": 0, "gradient": 0, "teacher": 1}  # argument -> whose width it has
FLOAT_POINTERS = {
    "pieces", "terms", "scales", "row_loss", "stats", "weights", "temperatures", "pending", "loss", "num_items",
    "upstream",
}  # fmt: skip
FLOATS = {
    "temperature", "student_softcap", "teacher_softcap", "beta", "beta_rest", "by_t2", "kd_weight", "ce_weight",
    "label_smoothing", "z_loss",
}  # fmt: skip


def every() -> list[Specialisation]:
    """As the driver's target has them: its warps, its limits of registers."""
    return specialisations.every(torch.device("cpu"))


def title(x: Specialisation) -> str:
    words = [x.kernel, x.student or "", x.teacher or "", x.constants.get("DIVERGENCE", "")]
    words += ["full" if x.constants.get("FULL") else ""]
    return "-".join(str(word) for word in words if word)


def _function_of(name: str) -> JITFunction:
    return getattr(kernels, name, None) or getattr(ends, name)


def _type_of(parameter: inspect.Parameter, widths: tuple[int, int]) -> str:
    name, annotation = parameter.name, str(parameter.annotation)
    if "constexpr" in annotation:
        return "constexpr"
    if name in LOGITS:
        return {2: "*i16", 4: "*fp32"}[widths[LOGITS[name]]]
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name == "labels":
        return "*i64"
    if name in FLOATS:
        return "fp32"
    return "i64" if "int64" in annotation else "i32"


def key_of(x: Specialisation) -> Key:
    parameters = inspect.signature(_function_of(x.kernel).fn).parameters
    types = {name: _type_of(p, (x.student, x.teacher)) for name, p in parameters.items()}
    constants = {name: value for name, value in x.constants.items() if name not in OPTIONS}
    options = {name: value for name, value in x.constants.items() if name in OPTIONS}
    return Key(x.kernel, by_name(types), by_name(constants), by_name(options))


def compiled(x: Specialisation, name: str) -> CompiledKernel:
    """For the target of that name."""
    key = key_of(x)
    source = ASTSource(_function_of(x.kernel), dict(key.types), dict(key.constants), {})
    return triton.compile(source, target=TARGETS[name], options=dict(key.options))


def compiled_again(x: Specialisation, first: CompiledKernel, name: str) -> CompiledKernel:
    """The same for another target, from the intermediate code that they have in common."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(first.asm["ttir"])
        return triton.compile(str(path), target=TARGETS[name], options=dict(key_of(x).options))


def compiled_for(title_: str, names: list[str]) -> dict[str, CompiledKernel]:
    """Target -> the specialisation of that title."""
    found: dict[str, CompiledKernel] = {}
    for name in names:
        compile_for(name)
        (x,) = [x for x in every() if title(x) == title_]
        found[name] = compiled_again(x, found[names[0]], name) if found else compiled(x, name)
    return found
