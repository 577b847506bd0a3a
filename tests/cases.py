"""The table of inputs that every backend must get right, each row with its reason. inputs.py says what words mean."""

from __future__ import annotations

from inputs import BF16, CHUNK, FP16, FP32, Case


def _case(reason: str, dtypes: str = "fp32 fp32", **fields) -> Case:
    names = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
    student, teacher = (names[d] for d in dtypes.split())
    return Case(reason, student_dtype=student, teacher_dtype=teacher, **fields)


SHAPES = [
    _case("softmax of one column is 1: loss and gradient are 0", vocab=1),
    _case("one free parameter", vocab=2),
    _case("vector of 8 minus one", vocab=7),
    _case("vector of 8 exactly", vocab=8),
    _case("vector of 8 plus one", "bf16 bf16", vocab=9),
    _case("vector of 16 minus one", "fp16 fp16", vocab=15),
    _case("vector of 16 exactly", "bf16 bf16", vocab=16),
    _case("vector of 16 plus one", vocab=17),
    _case("two vectors of 16 minus one: the pairwise bf16 store ends early", "bf16 bf16", vocab=31),
    _case("two vectors of 16 plus one", "bf16 fp32", vocab=33),
    _case("no row", lead=(0,), vocab=33),
    _case("no row in a batch", lead=(2, 0), vocab=5),
    _case("one row, no leading dimension", lead=(), vocab=33),
    _case("one row", lead=(1,), vocab=33),
    _case("rows not a multiple of anything", lead=(33,), vocab=65),
    _case("leading dimensions of three levels", lead=(2, 3, 2), vocab=19),
    _case("chunk minus one", vocab=CHUNK - 1),
    _case("chunk exactly", "bf16 bf16", vocab=CHUNK),
    _case("chunk plus one: a second chunk of one column", vocab=CHUNK + 1, regime="late_top"),
    _case("two chunks minus one", "fp16 bf16", lead=(2,), vocab=2 * CHUNK - 1, regime="late_top"),
    _case("two chunks plus one", "bf16 bf16", lead=(2,), vocab=2 * CHUNK + 1, regime="late_top"),
    _case("Llama 2 plus a padding token", lead=(2,), vocab=32001),
    _case("Llama 3 in bf16, few rows: a row is split over threads", "bf16 bf16", lead=(1,), vocab=128256),
    _case("Qwen", "bf16 fp32", lead=(1,), vocab=151936, regime="late_top"),
    _case("Gemma", lead=(1,), vocab=262144, regime="near"),
    _case("a million columns: exponentials made again for the gradient", "bf16 bf16", lead=(1,), vocab=2**20),
]

TEMPERATURES = [
    _case("T = 1: the cross-entropy shares the exponentials", temperature=1.0),
    _case("T = 2: squares", temperature=2.0, vocab=300),
    _case("T = 3: third powers", temperature=3.0),
    _case("T = 4: fourth powers, second chunk", temperature=4.0, vocab=CHUNK + 3, lead=(2,)),
    _case("T = 8: the largest power taken", temperature=8.0),
    _case("T = 9: beyond the powers, an exponential of its own", temperature=9.0),
    _case("T = 16.5 is no integer though it is large", temperature=16.5),
    _case("T = 20, softest", "bf16 bf16", temperature=20.0),
    _case("T = 0.1, hardest: exponents ten times the logits", temperature=0.1),
    _case("T = 0.7: below 1 and not a power of 2", temperature=0.7, vocab=CHUNK + 9, lead=(2,)),
    _case(
        "T = 2.5: an exponential of its own in two chunks",
        "fp16 fp16",
        temperature=2.5,
        vocab=CHUNK + 1,
        lead=(2,),
    ),
    _case("T = 0.1 on disagreeing rows: log-probabilities of -1000", temperature=0.1, regime="disagreeing"),
    _case("T = 3 on a ramp: powers rebased in every chunk", temperature=3.0, vocab=3 * CHUNK, regime="ascending"),
]

VALUES = [
    _case("late in training: the KL is 1e-4 of its parts", vocab=1000, regime="near", temperature=1.0),
    _case("late in training, bf16", "bf16 bf16", vocab=1000, regime="near"),
    _case("confident and agreeing rows", vocab=500, regime="peaked", temperature=1.0),
    _case("confident and agreeing, soft", "bf16 bf16", vocab=500, regime="peaked"),
    _case("confident and contradicting", vocab=500, regime="disagreeing", temperature=1.0),
    _case("confident and contradicting, fp16", "fp16 fp16", vocab=500, regime="disagreeing"),
    _case("confident and contradicting, across chunks", vocab=CHUNK + 700, regime="disagreeing", temperature=1.0),
    _case("p and q exactly 0 in fp32 where the other is not", vocab=200, regime="exact_zeros", temperature=1.0),
    _case("exact zeros in bf16", "bf16 bf16", vocab=200, regime="exact_zeros", temperature=0.7),
    _case("masked vocabulary, in both", vocab=50, regime="masked_both"),
    _case("a whole chunk masked in both", "bf16 bf16", lead=(2,), vocab=3 * CHUNK + 5, regime="masked_both"),
    _case("student forbids what the teacher allows: +inf where defined so", vocab=50, regime="masked_student"),
    _case("... in a whole chunk", lead=(2,), vocab=3 * CHUNK + 5, regime="masked_student"),
    _case("teacher forbids what the student allows", vocab=50, regime="masked_teacher"),
    _case("... in the whole first chunk", "fp16 fp16", lead=(2,), vocab=3 * CHUNK, regime="masked_teacher"),
    _case("the same row in both: loss and gradient exactly 0", vocab=777, regime="identical"),
    _case("the same row in both, bf16, two chunks", "bf16 bf16", vocab=CHUNK + 77, regime="identical"),
    _case("every column a tie", vocab=100, regime="flat"),
    _case("logits of +-1e4", vocab=100, regime="huge"),
    _case("logits of +-1e4, bf16, two chunks", "bf16 bf16", vocab=CHUNK + 100, regime="huge", temperature=1.0),
    _case("logits of exactly +-1e4, half of them tops", "fp16 fp16", vocab=100, regime="two_levels"),
    _case("a common offset of 1e4 in the student", vocab=100, regime="offset"),
    _case("a common offset of 1e4, T not a power of 2", vocab=CHUNK + 100, regime="offset", temperature=0.7),
    _case("the running maximum moves in every chunk", vocab=5 * CHUNK + 3, regime="ascending", lead=(2,)),
]

LAYOUT_CASES = [
    _case("row stride > V, offset base pointer", layout="padded", lead=(5,), vocab=67),
    _case("... in bf16: rows at odd addresses", "bf16 bf16", layout="padded", lead=(5,), vocab=CHUNK + 3),
    _case("... in fp16", "fp16 fp16", layout="padded", lead=(5,), vocab=31),
    _case("logits[:, 1:]", layout="shifted", lead=(3, 4), vocab=33),
    _case("logits[:, 1:] of the student alone", layout="shifted", teacher_layout="contiguous", lead=(3, 4), vocab=33),
    _case("every other row", layout="every_other", lead=(5,), vocab=33),
    _case("sequence first", "bf16 bf16", layout="sequence_first", lead=(3, 5), vocab=33),
    _case("more levels of strides than the kernels address", layout="permuted", lead=(2, 3, 4), vocab=17),
    _case("transposed last dimension", layout="columns_first", lead=(5,), vocab=33),
    _case("transposed teacher", teacher_layout="columns_first", lead=(5,), vocab=33),
    _case("one row seen as many", layout="expanded", lead=(6,), vocab=33),
    _case("one teacher row for all", "fp32 bf16", teacher_layout="expanded", lead=(6,), vocab=33),
    _case("padded student head", lead=(4,), vocab=64, teacher_vocab=51, options={"vocab": "truncate"}),
    _case("padded teacher head", "bf16 bf16", vocab=51, teacher_vocab=64, options={"vocab": "truncate"}),
    _case("padded student head across a chunk", lead=(2,), vocab=2 * CHUNK, teacher_vocab=CHUNK - 3,
          layout="padded", options={"vocab": "truncate"}),
    _case("student fp16, teacher fp32", "fp16 fp32", vocab=100),
    _case("student fp32, teacher bf16", "fp32 bf16", vocab=100),
    _case("student bf16, teacher fp16", "bf16 fp16", vocab=100),
]  # fmt: skip

CASES = SHAPES + TEMPERATURES + VALUES + LAYOUT_CASES
