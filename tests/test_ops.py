"""torch.ops.fastkd: registration, fake kernels, autograd formulas, and the transforms of torch around them."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from inputs import BF16, FP16, FP32
from reference import DIVERGENCES
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import functional

WORDS = ("forward", "forward_", "rescale", "rescale_")
FULL = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 2.0}


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of every call to an operator of fastkd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            self.calls.append((func._schema.name.removeprefix("fastkd::"), copies))
        return func(*args, **(kwargs or {}))


def _rows(lead=(3, 2), vocab=17, dtype=FP32):
    student, teacher = 3 * torch.randn(*lead, vocab), 3 * torch.randn(*lead, vocab)
    labels = torch.randint(vocab, lead)
    if labels.numel() > 1:
        labels.view(-1)[1] = -100
    return student.to(dtype), teacher.to(dtype), labels


SITUATIONS = {
    "plain": {},
    "everything": {**FULL, "return_stats": True, "student_softcap": 5.0},
    "none": {"reduction": "none", **FULL},
    "value alone": {"grad": False, **FULL},
    "in place": {"inplace": True, **FULL, "return_stats": True},
    "in place none": {"inplace": True, "reduction": "none"},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": FP16, "reduction": "sum"},
    "tensors": {"token_weights": True, "temperatures": True, "num_items_in_batch": 5},
    "one row": {"lead": ()},
    "no rows": {"lead": (0,)},
}


def _calls(situation: dict) -> list[tuple[str, tuple]]:
    """The operators' arguments as kd_loss and its backward pass them."""
    options = dict(situation)
    student, teacher, labels = _rows(options.pop("lead", (3, 2)), dtype=options.pop("dtype", FP32))
    grad = options.pop("grad", True)
    if options.pop("token_weights", False):
        options["token_weights"] = torch.rand(labels.shape)
    if options.pop("temperatures", False):
        options["temperature"] = 1 + torch.rand(labels.shape)
    student = student.requires_grad_() * 1 if grad else student
    recorder = Recorder()
    with recorder:
        result = fastkd.kd_loss(student, teacher, labels, backend="native", **options)
        loss = (result[0] if isinstance(result, tuple) else result).sum()
        if grad:
            torch.autograd.grad(3 * loss, student, retain_graph=True)
            torch.autograd.grad(3 * loss, student)
    return recorder.calls


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_opcheck(situation: dict, native: str) -> None:
    """Schema, autograd registration, fake kernel, tracing with static and symbolic shapes, as kd_loss calls them."""
    calls = _calls(situation)
    assert calls
    for name, arguments in calls:
        if name.endswith("forward") and arguments[-1]:  # with_gradient
            arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
        opcheck(getattr(torch.ops.fastkd, name).default, arguments)


def _prefix() -> str:
    """Of the operators that "native" means here: triton_plugin.py puts Triton's in their place."""
    x = torch.zeros(1, 1)
    return {"native": "kd_", "triton": "triton_"}[functional.select_backend("native", x, x)]


def test_every_operator_was_checked(native: str) -> None:
    names = {name.removeprefix("fastkd::") for name in torch._C._dispatch_get_all_op_names() if "fastkd::" in name}
    registered = {name for name in names if name.startswith(_prefix()) and "sparse" not in name}  # see test_sparse_api
    assert registered == {_prefix() + word for word in WORDS}
    called = {name for situation in SITUATIONS.values() for name, _ in _calls(situation)}
    assert called == registered


@pytest.mark.parametrize("word", WORDS)
def test_fake_kernels_have_the_shapes_and_dtypes_of_the_real_ones(word: str, native: str) -> None:
    name = _prefix() + word
    operator = getattr(torch.ops.fastkd, name).default
    for situation in SITUATIONS.values():
        for called, arguments in _calls(situation):
            if called != name:
                continue
            real = operator(*arguments)
            meta = operator(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
            for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (real, meta))):
                if x is not None:
                    assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


class TestCompile:
    """torch.compile(fullgraph=True): one graph for every number and shape."""

    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def _compiled(self, function, dynamic: bool | None = True):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter

    def _check(self, compiled, plain, rows, *more) -> None:
        """Loss and gradient of the compiled function are those of the plain one, bit for bit."""
        student, teacher, labels = rows
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        a, b = compiled(one, teacher, labels, *more), plain(two, teacher, labels, *more)
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(one.grad, two.grad)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_no_recompile_when_numbers_and_shapes_change(self, divergence: str, native: str) -> None:
        def loss(student, teacher, labels, temperature, beta, kd_weight, ce_weight):
            return fastkd.kd_loss(
                student, teacher, labels, divergence=divergence, temperature=temperature, beta=beta,
                kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=0.1, backend="native",
            )  # fmt: skip

        compiled, counter = self._compiled(loss)
        for lead, *numbers in (
            ((6,), 2.0, 0.5, 1.0, 0.5),
            ((9,), 3.5, 0.3, 0.7, 0.25),
            ((4,), 0.7, 0.25, 2.0, 1.5),
            ((31,), 1.5, 0.9, 0.125, 3.0),
        ):
            self._check(compiled, loss, _rows(lead), *numbers)
        assert counter.frame_count == 1, f"{counter.frame_count} compilations for 4 calls"

    @pytest.mark.parametrize("situation", ["none", "tensors", "softcaps", "bf16", "sum of factors"])
    def test_situations(self, situation: str, native: str) -> None:
        options = {
            "none": {"reduction": "none"},
            "tensors": {"temperature": torch.linspace(1, 2, 6), "token_weights": torch.linspace(0.5, 1, 6)},
            "softcaps": {"student_softcap": 5.0, "teacher_softcap": 3.0},
            "bf16": {},
            "sum of factors": {"reduction": "sum", "z_loss": 0.01},
        }[situation]

        def loss(student, teacher, labels):
            return 3 * fastkd.kd_loss(student, teacher, labels, ce_weight=0.5, backend="native", **options)

        compiled, counter = self._compiled(loss)
        self._check(compiled, loss, _rows((6,), dtype=BF16 if situation == "bf16" else FP32))
        assert counter.frame_count == 1

    def test_items_as_a_tensor(self, native: str) -> None:
        def loss(student, teacher, labels, items):
            return fastkd.kd_loss(student, teacher, labels, num_items_in_batch=items, backend="native")

        compiled, counter = self._compiled(loss)
        for items in (5, 17):
            self._check(compiled, loss, _rows((6,)), torch.tensor(items))
        assert counter.frame_count == 1

    def test_statistics(self, native: str) -> None:
        student, teacher, labels = _rows((6,))

        def loss(s):
            return fastkd.kd_loss(s, teacher, labels, return_stats=True, backend="native", **FULL)

        compiled, _ = self._compiled(loss)
        (value, stats), (expected, expected_stats) = compiled(student), loss(student)
        assert torch.equal(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats))

    def test_within_a_model_by_inductor(self, native: str) -> None:
        """Forward, loss and backward in one graph; inplace gives way to the compiler's own plan of memory."""
        head = torch.nn.Linear(8, 33)
        module = fastkd.KDLoss(inplace=True, **FULL)
        hidden, teacher, labels = torch.randn(5, 8), torch.randn(5, 33), torch.randint(33, (5,))

        def step(hidden):
            return module(head(hidden), teacher, labels)

        expected = step(hidden)
        expected_gradient = torch.autograd.grad(expected, head.weight)[0].clone()
        loss = torch.compile(step, fullgraph=True)(hidden)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(loss, head.weight)[0], expected_gradient, rtol=1e-5, atol=1e-7)

    def test_eager_backend(self) -> None:
        def loss(student, teacher, labels):
            return fastkd.kd_loss(student, teacher, labels, backend="eager", divergence="jsd", **FULL)

        compiled, counter = self._compiled(loss)
        first = None
        for lead in ((6,), (9,), (31,)):
            rows = _rows(lead)
            torch.testing.assert_close(compiled(*rows), loss(*rows))
            first = first or counter.frame_count
        assert counter.frame_count == first, "another number of rows compiles anew"


class TestTransforms:
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    def test_autocast(self, dtype: torch.dtype, native: str) -> None:
        """Under autocast the head gives low-precision logits, the loss stays fp32, the weights get fp32 gradients."""
        head, hidden = torch.nn.Linear(8, 33), torch.randn(5, 8)
        teacher = torch.randn(5, 33)
        with torch.autocast("cpu", dtype=dtype):
            logits = head(hidden)
            loss = fastkd.kd_loss(logits, teacher, backend="native")
        assert logits.dtype == dtype and loss.dtype == FP32
        loss.backward()
        assert head.weight.grad.dtype == FP32
        outside = fastkd.kd_loss(logits.detach(), teacher, backend="native")
        assert torch.equal(loss, outside), "autocast must not change the loss's own arithmetic"

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_activation_checkpointing(self, inplace: bool, use_reentrant: bool, native: str) -> None:
        """Head and loss recomputed in backward: the gradient of the plain run."""
        head, hidden = torch.nn.Linear(8, 33), torch.randn(5, 8, requires_grad=True)
        teacher, labels = torch.randn(5, 33), torch.randint(33, (5,))

        def loss(hidden):
            return fastkd.kd_loss(head(hidden), teacher, labels, inplace=inplace, backend="native", **FULL)

        plain = torch.autograd.grad(loss(hidden), (hidden, head.weight))
        kept = [x.clone() for x in plain]
        hidden.grad = head.weight.grad = None
        checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
        assert torch.equal(hidden.grad, kept[0]) and torch.equal(head.weight.grad, kept[1])

    def test_func_grad_works_or_says_what_to_do(self, native: str) -> None:
        student, teacher, _ = _rows((4,))
        expected = torch.autograd.grad(fastkd.kd_loss(student.requires_grad_(), teacher, backend="native"), student)[0]
        try:
            gradient = torch.func.grad(lambda s: fastkd.kd_loss(s, teacher, backend="native"))(student.detach())
        except (RuntimeError, ValueError) as error:
            assert "torch.func" in str(error) and "eager" in str(error), str(error)
        else:
            assert torch.equal(gradient, expected)

    def test_func_grad_of_the_eager_backend(self) -> None:
        student, teacher, _ = _rows((4,))
        gradient = torch.func.grad(lambda s: fastkd.kd_loss(s, teacher, backend="eager"))(student)
        expected = torch.autograd.grad(fastkd.kd_loss(student.requires_grad_(), teacher, backend="eager"), student)[0]
        torch.testing.assert_close(gradient, expected)

    def test_export(self, native: str) -> None:
        """A traced graph holds the operator as one node."""

        class Value(torch.nn.Module):
            def forward(self, student, teacher):
                return fastkd.kd_loss(student, teacher, temperature=2.0, backend="native")

        student, teacher, _ = _rows((4,))
        program = torch.export.export(Value(), (student, teacher))
        assert f"fastkd.{_prefix()}forward" in str(program.graph)
        assert torch.equal(program.module()(student, teacher), Value()(student, teacher))

    def test_fake_tensors(self, native: str) -> None:
        """Shapes without data: planning a model's memory reads no value."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode() as mode:
            student, teacher, labels = (mode.from_tensor(x) for x in _rows((4,)))
            loss = fastkd.kd_loss(student.requires_grad_(), teacher, labels, reduction="none", backend="native", **FULL)
            assert loss.shape == (4,) and loss.dtype == FP32
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert gradient.shape == student.shape

    def test_hooks_see_the_gradient(self, native: str) -> None:
        student, teacher, _ = _rows((4,))
        logits = student.requires_grad_() * 1
        seen = []
        logits.register_hook(lambda g: seen.append(g.clone()))
        fastkd.kd_loss(logits, teacher, backend="native").backward()
        assert torch.equal(seen[0], student.grad)

    def test_anomaly_mode(self, native: str) -> None:
        student, teacher, _ = _rows((4,))
        with torch.autograd.detect_anomaly(check_nan=True):
            fastkd.kd_loss(student.requires_grad_(), teacher, backend="native").backward()
        assert student.grad.isfinite().all()
