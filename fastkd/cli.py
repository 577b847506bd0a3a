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
    "cache-teacher": ("fastkd.trainer.cache_teacher", "trainer", "one pass of a teacher over a data set, kept on disk"),
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
    plan = commands.add_parser("plan", help="how the CUDA kernels would be launched on a GPU, which need not be there")
    plan.add_argument("--gpu", default="h100", choices=("a100", "h100", "b200"), help="default: h100")
    plan.add_argument("--rows", type=int, default=8192, help="tokens N (default: 8192)")
    plan.add_argument("--vocab", type=int, default=128256, help="columns V (default: 128256)")
    plan.add_argument("--dtype", default="bfloat16", help="dtype of the student's logits (default: bfloat16)")
    plan.add_argument("--teacher-dtype", help="dtype of the teacher's logits (default: that of the student)")
    for name, (_, _, text) in DELEGATED.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _dtype(name: str):
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must name a torch dtype such as float32 or bfloat16; got {name!r}")
    return dtype


def _plan(arguments: argparse.Namespace) -> int:
    from . import ops

    try:
        if ops.load_error:
            raise RuntimeError(ops.load_error)
        from .cuda import GPUS, plan_loss

        student = _dtype(arguments.dtype)
        teacher = _dtype(arguments.teacher_dtype or arguments.dtype)
        for mixed_kl, words in ((True, "forward_kl, reverse_kl, symmetric_kl"), (False, "the other divergences")):
            plan = plan_loss(
                arguments.rows, arguments.vocab, GPUS[arguments.gpu], student_dtype=student, teacher_dtype=teacher,
                mixed_kl=mixed_kl,
            )  # fmt: skip
            print(f"{words}\n   {plan}")
    except (RuntimeError, ValueError) as error:
        print(f"fastkd plan: {error}", file=sys.stderr)
        return 2
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from .backends import explain

    try:
        student = torch.empty(1, 1, dtype=_dtype(arguments.dtype), device=arguments.device)
        teacher = torch.empty(1, 1, dtype=_dtype(arguments.teacher_dtype or arguments.dtype), device=arguments.device)
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
    if arguments.command == "plan":
        return _plan(arguments)
    from .backends import backends

    print(backends())
    return 0


if __name__ == "__main__":
    sys.exit(main())
