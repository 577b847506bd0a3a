"""What the demo shows: one table, three sentences, samples."""

from __future__ import annotations

from rich.table import Table
from torch import Tensor

from ..trainer.evaluate import Evaluation
from .compare import Difference, paired_difference
from .experiment import Measured, Regime

KIND = {"kd": "KD + CE", "hard": "hard labels"}


def differences(a: Evaluation, b: Evaluation, document: Tensor) -> dict[str, Difference]:
    """Paired differences a - b of the three figures."""
    return {
        name: paired_difference(getattr(a, name), getattr(b, name), document) for name in ("nll", "kl", "agreement")
    }


def _model_row(table: Table, model: Measured) -> None:
    means = model.test.means()
    table.add_row(
        model.name, f"{model.parameters / 1e6:.1f}", f"{model.megabytes:.0f}", f"{model.tokens_per_s:,.0f}",
        f"{means['nll']:.3f}", f"{means['kl']:.3f}", f"{100 * means['agreement']:.1f}",
    )  # fmt: skip


def _difference_row(table: Table, name: str, d: dict[str, Difference], last: bool = False) -> None:
    share = d["agreement"]
    table.add_row(
        f"  {name}", "", "", "", str(d["nll"]), str(d["kl"]), f"{100 * share.mean:+.1f} ±{100 * share.half_width:.1f}",
        style="italic", end_section=last,
    )  # fmt: skip


def describe(regime: Regime) -> str:
    """The regime in words."""
    return f"{regime.rows} rows read {regime.epochs} times" if regime.epochs > 1 else f"{regime.rows} rows read once"


def result_table(base: list[Measured], regimes: list[Regime], document: Tensor, seq_len: int) -> Table:
    """At most 100 columns. ``base`` ends with the corrected teacher and the start, in this order."""
    teacher = base[-2]
    table = Table(
        title=f"{len(document)} test rows of {seq_len} tokens from {len(set(document.tolist()))} documents; "
        "± is 95 %, paired, by document",
        title_justify="left",
        caption="KL, top-1: to the corrected teacher. tok/s: forward pass. MB: fp32. Students: best on dev rows.",
        caption_justify="left",
    )
    table.add_column("model", no_wrap=True)
    for name in ("par. M", "MB", "tok/s", "nll (nats)", "KL to teacher", "top-1 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in base:
        _model_row(table, model)
    for regime in regimes:
        table.add_section()
        table.add_row(f"[bold]{describe(regime)}[/]")
        for model in regime.models.values():
            _model_row(table, model)
        kd, hard = regime.models["kd"].test, regime.models["hard"].test
        _difference_row(table, "KD + CE - hard labels", differences(kd, hard, document))
        _difference_row(table, "KD + CE - teacher", differences(kd, teacher.test, document))
        _difference_row(table, "hard labels - teacher", differences(hard, teacher.test, document))
    return table


def _verdict(d: Difference, better_is_lower: bool = True) -> str:
    """Who is ahead by the error bar."""
    if not d.is_clear:
        return "no difference beyond the error bar"
    return "distillation is ahead" if (d.mean < 0) == better_is_lower else "hard labels are ahead"


def three_sentences(teacher: Measured, regimes: list[Regime], document: Tensor, smoke: bool) -> list[str]:
    """What was learnt, computed from the results whatever they are."""
    reused = regimes[0]
    kd, hard = reused.models["kd"], reused.models["hard"]
    d = differences(kd.test, hard.test, document)
    wins = int((kd.test.nll < hard.test.nll).sum())
    first = (
        f"{describe(reused).capitalize()}: held-out nll {kd.test.means()['nll']:.3f} with KD + CE and "
        f"{hard.test.means()['nll']:.3f} with hard labels at their best epoch, a difference of {d['nll']} nats "
        f"a token ({_verdict(d['nll'])}; lower on {wins} of {len(document)} rows), and top-1 agreement with "
        f"the teacher differs by {100 * d['agreement'].mean:+.1f} ±{100 * d['agreement'].half_width:.1f} points "
        f"({_verdict(d['agreement'], better_is_lower=False)})."
    )
    loss = paired_difference(kd.test.nll, teacher.test.nll, document)
    second = (
        f"The distilled student has {100 * kd.parameters / teacher.parameters:.0f} % of the teacher's parameters, runs "
        f"at {kd.tokens_per_s / teacher.tokens_per_s:.2f} x its speed, agrees with its first choice on "
        f"{100 * kd.test.means()['agreement']:.0f} % of the tokens and stands {loss} nats a token from it."
    )
    limits = "One seed; the error bars cover the choice of test rows and nothing else"
    if smoke:
        return [
            first,
            second,
            f"This was a smoke run: it shows that the parts work and far too little text was read. {limits}.",
        ]
    if len(regimes) == 1:
        return [
            first,
            second,
            f"There was no time for a comparison with text that is new at every step. {limits}.",
        ]
    fresh = regimes[1]
    f = differences(fresh.models["kd"].test, fresh.models["hard"].test, document)
    third = (
        f"With as many tokens of text that is new at every step ({describe(fresh)}) the difference in nll is "
        f"{f['nll']} ({_verdict(f['nll'])}) and in KL to the teacher {f['kl']} ({_verdict(f['kl'])}), so what "
        f"distillation gains here is {_compared(d['nll'], f['nll'])} when text is scarce and read "
        f"again; {limits[0].lower()}{limits[1:]}."
    )
    return [first, second, third]


def _compared(reused: Difference, fresh: Difference) -> str:
    """The gain (a negative difference) with reused text against that with fresh text; the two are not independent,
    so their half widths are added, which can only err towards calling them alike."""
    if abs(reused.mean - fresh.mean) <= reused.half_width + fresh.half_width:
        return "not clearly different"
    return "larger" if reused.mean < fresh.mean else "smaller"
