"""Checks of lesson 11.  Everything is whole numbers, so everything must be equal."""

import numpy as np

from lessons._lib.calls import StudentFailed
from lessons._lib.checks import exact, exercise, several
from lessons._lib.conventions import Convention, flipped, rng
from lessons._lib.language import say
from lessons._lib.pictures import REFERENCE, STUDENT, raster, side_by_side
from minisb.ops import codes

REFUSED = ("minisb.ops.codes",)
CONVENTIONS = (
    Convention(
        "highest bit first",
        "bit t travels at step t (lowest bit first)",
        "bit steps-1-t travels at step t (highest bit first)",
        "the highest bit travels first",
        "最高位先传",
    ),
    Convention(
        "late spikes",
        "the first |count| steps fire, the others are silent",
        "the last |count| steps fire, the others are silent",
        "binary and ternary spikes come at the end of the train, not at its beginning",
        "二值码和三值码的脉冲排在序列末尾，而不是开头",
    ),
)
WRITTEN = codes.CODES


def in_order(spikes, code):
    """Spikes of the package's order, in the order of this course; its own inverse."""
    turned = "late spikes" if code in codes.RATE else "highest bit first"
    return spikes[::-1] if turned in flipped(CONVENTIONS) else spikes


def expected(counts, code, steps):
    return in_order(codes.encode(counts, code, steps), code)


def some_counts(key, code, shape=(4, 5), most=7):
    """Counts with both extremes and zero; negative ones where the code has a sign."""
    low = -most - (code == "twos_complement") if code in codes.SIGNED else 0
    counts = rng(11, key).integers(low, most + 1, shape)
    counts.flat[:4] = low, most, 0, 1
    return counts


def check_encoder(f, code):
    for steps, title in (
        (7 if code in codes.RATE else 4, say("just enough steps", "步数刚好够")),
        (9, say("more steps than needed", "步数有富余")),
    ):
        counts = some_counts(1, code)
        want = expected(counts, code, steps)
        yield exact(title, f(counts, steps), want, encoder_mistakes(counts, code, steps, want))
    counts = np.array(5)
    yield exact(say("a single count", "单独一个数"), f(counts, 6), expected(counts, code, 6))


def encoder_mistakes(counts, code, steps, want):
    time = np.arange(steps).reshape(-1, *[1] * counts.ndim)
    sign, bits = np.sign(counts), np.abs(counts) >> time & 1
    return [
        (
            want[::-1],
            say(
                "Which end of the train comes first?  Read the conventions at the top of the file.",
                "脉冲序列从哪一端开始？再读文件开头的约定。",
            ),
        ),
        (np.abs(want), say("Where is the sign?", "符号去哪了？")),
        (
            want * (counts > 0) if code in codes.SIGNED else counts[None],
            say("What becomes of negative counts?", "负的脉冲数怎么办？"),
        ),
        (
            want << time if code not in codes.RATE else counts[None],
            say(
                "That is what the bits are worth (1, 2, 4, ...).  How do you get the bit itself, 0 or 1?",
                "这是各位的价值（1、2、4……）。怎样得到那一位本身，0 或 1？",
            ),
        ),
        (
            np.sign(counts) * (time < np.abs(counts)) if code not in codes.RATE else counts[None],
            say(
                "That is a rate code: a spike for each unit.  Here the spike of step t is bit t.",
                "这是每个单位发一个脉冲的码。在这里，第 t 步的脉冲是第 t 位。",
            ),
        ),
        (
            counts >> time & 1 if code == "bidirectional" else counts[None],
            say(
                "Those are the bits of the count itself (two's complement).  Bits of what are asked for here?",
                "这是脉冲数本身的各位（补码）。这里要的是谁的各位？",
            ),
        ),
        (time <= np.abs(counts), say("How many spikes has a count of 0?", "计数为 0 时有几个脉冲？")),
        (
            bits * sign,
            say(
                "That is the bidirectional code, sign times bits.  How are negative numbers stored in a computer?",
                "这是双向按位码，符号乘以各位。计算机里的负数是怎样存的？",
            ),
        ),
        (bits, say("What are the bits of -1 modulo 2^steps?", "-1 对 2^steps 取模之后，各位是什么？")),
        (
            counts[None] * (time == 0),
            say(
                "A spike is -1, 0 or 1.  How does a larger count spread over time?",
                "一个脉冲只能是 -1、0 或 1。更大的计数怎样在时间上展开？",
            ),
        ),
    ]


@exercise
def encode_binary(f):
    yield from check_encoder(f, "binary")


@exercise
def encode_ternary(f):
    yield from check_encoder(f, "ternary")


@exercise
def encode_bitwise(f):
    yield from check_encoder(f, "bitwise")


@exercise
def encode_bidirectional(f):
    yield from check_encoder(f, "bidirectional")


@exercise
def encode_twos_complement(f):
    yield from check_encoder(f, "twos_complement")


@exercise
def decode(f):
    for code in WRITTEN:
        counts = some_counts(2, code)
        spikes = expected(counts, code, 9)
        yield exact(code, f(spikes, code), counts, decode_mistakes(spikes))
    counts = np.array([300, 513, -400])
    spikes = expected(counts, "twos_complement", 12)
    yield exact(
        say("counts beyond a byte", "超过一个字节的计数"),
        f(spikes, "twos_complement"),
        counts,
        [
            (
                f(spikes, "twos_complement"),
                say("Which dtype holds your powers of two?", "你的 2 的幂用什么 dtype 存放？"),
            )
        ],
    )


def decode_mistakes(spikes):
    time = np.arange(len(spikes))
    return [
        (spikes.sum(0), say("What is a spike of step t worth in this code?", "在这种码里，第 t 步的一个脉冲值多少？")),
        (
            np.tensordot(2**time, spikes, 1),
            say(
                "Is the highest bit worth +2^(steps-1)?  Does every code have bits?",
                "最高位值 +2^(steps-1) 吗？每种码都有“位”吗？",
            ),
        ),
        (np.tensordot(2 ** time[::-1], spikes, 1), say("Which bit comes first?", "哪一位先来？")),
        (np.tensordot(2 ** (time + 1), spikes, 1), say("Is step 0 worth 1 or 2?", "第 0 步值 1 还是 2？")),
    ]


@exercise
def event_matmul(f):
    for code in WRITTEN:
        counts = some_counts(3, code, (3, 40))
        w = rng(11, 4).integers(-127, 128, (6, 40)).astype(np.int8)
        plain = codes.encode(counts, code, 9)
        spikes = in_order(plain, code)
        want, additions = codes.event_linear(plain, w, code)
        got = f(spikes, w, code)
        failed = several(code, got, 2)
        if failed:
            yield failed
            return
        narrow = say("Sums of int8 leave int8: where do you widen?", "int8 的和会超出 int8：在哪里换成更宽的类型？")
        worth, in_steps = codes.step_values(code, 9), (plain @ w.T).astype(np.int64)  # a product of int8 stays in int8
        weighted = (plain * worth[:, None, None]).astype(np.int8)  # worth times spikes, kept in a byte
        int8_sums = (
            (counts.astype(np.int8) @ w.T).astype(np.int8),
            np.tensordot(worth, in_steps, 1),
            (weighted @ w.T).astype(np.int64).sum(0),
            weighted.astype(np.int64).sum(0) @ w.T.astype(np.int64),
        )
        yield exact(
            say(f"{code}: y is counts w^T", f"{code}：y 等于 counts w^T"),
            got[0],
            want,
            [
                *((wrong, narrow) for wrong in int8_sums),
                (
                    spikes.sum(0).astype(np.int64) @ w.T,
                    say("What is a step worth in this code?", "在这种码里，一步值多少？"),
                ),
                *decode_products(spikes, w),
            ],
        )
        yield exact(
            say(f"{code}: additions", f"{code}：加法次数"),
            got[1],
            additions,
            [
                *(
                    (wrong, say("Does a spike of -1 cost an addition, too?", "-1 的脉冲也要算一次加法吗？"))
                    for wrong in (int(spikes.sum()), int((spikes > 0).sum()))
                ),
                (
                    additions * len(w),
                    say("A whole column of w counts as one addition here.", "这里 w 的一整列算一次加法。"),
                ),
                (spikes.size, say("Do silent steps cost anything?", "静默的步有代价吗？")),
            ],
        )


def decode_products(spikes, w):
    return [(wrong @ w.T.astype(np.int64), question) for wrong, question in decode_mistakes(spikes.astype(np.int64))]


# --- the picture -----------------------------------------------------------------------------------

SHOWN = np.array([0, 1, 2, 3, 5, 7, -1, -2, -3, -6])


def show(student, plt):
    """The same ten counts in every code, the student's beside the reference, with steps and spikes."""
    pairs = []
    for code in WRITTEN:
        counts = SHOWN if code in codes.SIGNED else np.abs(SHOWN)
        steps = codes.steps_needed(counts, code)
        want = expected(counts, code, steps)
        try:
            got, whose = np.asarray(student(f"encode_{code}")(counts, steps)), "yours"
        except StudentFailed as failed:
            got, whose = 0 * want, failed.kind
        pairs.append((code, f"{whose}: {np.count_nonzero(got)} spikes, {steps} steps", got, want))
    if plt is None:
        return side_by_side(
            p for code, note, got, want in pairs for p in ((f"{code}, {note}", got.T), ("reference", want.T))
        )
    figure, axes = plt.subplots(2, 5, figsize=(13, 5), layout="constrained")
    for column, (code, note, got, want) in zip(axes.T, pairs, strict=True):
        raster(column[0], got, f"{code}\n{note}", STUDENT)
        raster(column[1], want, f"reference: {np.count_nonzero(want)} spikes", REFERENCE)
        for ax in column:
            ax.set_yticks(range(len(SHOWN)), SHOWN if code in codes.SIGNED else np.abs(SHOWN))
            ax.set_ylabel("count")
    return figure
