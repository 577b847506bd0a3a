"""The ``fastkd`` command. Each subcommand's code, and what it depends on, is imported only when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# subcommand -> (module with main(argv) -> exit status, the extra it needs, what it does)
DELEGATED = {
    "bench": ("fastkd.bench", "bench", "time and memory of the loss against naive PyTorch and others"),
    "distill": ("fastkd.trainer", "trainer", "distil a teacher into a student: the reference trainer"),
    "demo": ("fastkd.demo", "trainer", "distil the pretrained SmolLM2-135M and compare the students"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastkd", description="The knowledge-distillation loss, fused.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("backends", help="what is built on this machine and what would run")
    explain = commands.add_parser("explain", help="which backend takes logits of a device and dtype, and why")
    explain.add_argument("--device", default="cpu", help="device of the logits (default: cpu)")
    explain.add_argument("--dtype", default="float32", help="dtype of the student's logits (default: float32)")
    explain.add_argument("--teacher-dtype", help="dtype of the teacher's logits (default: that of the student)")
    explain.add_argument("--backend", default="auto", help="auto, native, triton or eager (default: auto)")
    for name, (_, _, text) in DELEGATED.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from .backends import explain

    def logits(dtype_name: str) -> torch.Tensor:
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must name a torch dtype such as float32 or bfloat16; got {dtype_name!r}")
        return torch.empty(1, 1, dtype=dtype, device=arguments.device)

    try:
        student = logits(arguments.dtype)
        teacher = logits(arguments.teacher_dtype or arguments.dtype)
        print(explain(student, teacher, backend=arguments.backend))
    except (AssertionError, RuntimeError, ValueError) as error:  # torch raises the first two for an absent device
        print(f"fastkd explain: {error}", file=sys.stderr)
        return 2
    return 0


def _delegate(command: str, argv: list[str]) -> int:
    module, extra, _ = DELEGATED[command]
    try:
        main = importlib.import_module(module).main
        return main(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fastkd":
            raise
        print(f'fastkd {command} needs {error.name}: pip install "fastkd[{extra}]"', file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in DELEGATED:
        return _delegate(argv[0], argv[1:])
    arguments = _parser().parse_args(argv)
    if arguments.command == "explain":
        return _explain(arguments)
    from .backends import backends

    print(backends())
    return 0


if __name__ == "__main__":
    sys.exit(main())
