"""What a check says: results, limits with their reasons, and where a first difference is.

A check of a lesson is a generator that takes the student's function and yields Results:

    @exercise
    def gla_step(f):
        yield close("one token", f(q, k, v, log_g, state), expected, FLOAT64)

`@exercise` turns it into  gla_step(function) -> Report, which can be printed.  It stops at the first
failure, because one question at a time is what a student can answer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from lessons._lib.calls import StudentFailed, careful
from lessons._lib.language import say


@dataclass(frozen=True)
class Limit:
    """How far a result may be from the expected one, and why.

    right: the error of a correct answer, at most.  wrong: that of the nearest wrong one, at least.
    `python -m lessons._ci` holds both against the adapters and the mutants, and the limit at least
    ten times away from both.
    """

    value: float
    right: float
    wrong: float
    dtype: str = "float64"
    metric: str = "relative RMS"

    def __str__(self):
        return say(
            f"limit {self.value:.0e}, {self.metric} in {self.dtype}: "
            f"right answers stay under {self.right:.0e}, the nearest wrong one reaches {self.wrong:.1g}",
            f"限值 {self.value:.0e}（{self.dtype}，相对均方根误差）："
            f"正确答案低于 {self.right:.0e}，最接近的错误答案达到 {self.wrong:.1g}",
        )


@dataclass
class Result:
    """One thing that was tested.  text: what the student reads below the title."""

    title: str
    passed: bool
    text: str = ""
    error: float = 0.0
    limit: Limit | None = None

    def __str__(self):
        if self.passed:
            return f"  ok  {self.title}" + (f"  ({self.text})" if self.text else "")
        return say("  NO  ", "  不对  ") + self.title + "".join(f"\n        {line}" for line in self.text.splitlines())


@dataclass
class Report:
    """What came out of checking one function."""

    name: str
    results: list = field(default_factory=list)
    written: bool = True
    waits_for: str = ""  # an earlier function that this one calls and that does not pass yet

    @property
    def passed(self) -> bool:
        return self.written and bool(self.results) and all(r.passed for r in self.results)

    def __str__(self):
        if self.waits_for:
            return f"{self.name}: " + say(
                f"waits for {self.waits_for}, which it calls and which does not pass yet",
                f"先等 {self.waits_for}：这个函数调用了它，而它还没有通过",
            )
        if not self.written:
            return f"{self.name}: " + say("not written yet", "还没有写")
        state = say("passes", "通过") if self.passed else say("not right yet", "还不对")
        said = {r.limit for r in self.results if not r.passed}  # a failure names its limit itself
        limits = dict.fromkeys(str(r.limit) for r in self.results if r.limit and r.limit not in said)
        return "\n".join([f"{self.name}: {state}", *map(str, self.results), *(f"      {text}" for text in limits)])

    __repr__ = __str__  # so that a notebook cell that ends in check.f(f) shows it


def exercise(check):
    """Turn the generator check(f) into  check(function) -> Report."""

    @functools.wraps(check)
    def run(function) -> Report:
        report = Report(check.__name__)
        try:
            for result in check(careful(function)):
                report.results.append(result)
                if not result.passed:
                    break
        except StudentFailed as failed:
            report.written = failed.kind != "not written"
            if report.written:
                report.results.append(Result(failed.title(), False, failed.text))
        return report

    run.is_exercise = True
    return run


# --- comparisons -----------------------------------------------------------------------------------


def close(title, got, expected, limit: Limit, mistakes=()) -> Result:
    """got against expected, by relative RMS.

    mistakes: pairs (what a likely mistake would give, the question that points at it), or a function
    that makes them, called only if they are needed.
    """
    wrong_kind = _kind(title, got, expected)
    if wrong_kind:
        return wrong_kind
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    error = relative_rms(got, expected)
    if error <= limit.value:
        text = say(f"error {error:.1e}, limit {limit.value:.0e}", f"误差 {error:.1e}，限值 {limit.value:.0e}")
        return Result(title, True, text, error, limit)
    lines = [say(f"error {error:.2g}; ", f"误差 {error:.2g}；") + str(limit)]
    scale = np.sqrt((expected**2).mean())
    lines += _first_difference(got, expected, np.abs(got - expected) <= limit.value * scale)
    lines += _question(got, expected, mistakes, 10 * limit.value)
    return Result(title, False, "\n".join(lines), error, limit)


def exact(title, got, expected, mistakes=()) -> Result:
    """Integers (counts, spikes, sums) have to be equal: no rounding is involved, so no limit either."""
    wrong_kind = _kind(title, got, expected)
    if wrong_kind:
        return wrong_kind
    got, expected = np.asarray(got), np.asarray(expected)
    same = got == expected
    if same.all():
        return Result(title, True, say("whole numbers: every entry equal", "整数：每个元素都相等"))
    share = float((~same).mean())
    lines = [
        say(f"{share:.0%} of the entries differ; whole numbers must be equal", f"{share:.0%} 的元素不同；整数必须相等")
    ]
    lines += _first_difference(got, expected, same)
    lines += _question(got, expected, mistakes, 0.0)
    return Result(title, False, "\n".join(lines), share)


def holds(title, condition, ok: str = "", question: str = "") -> Result:
    """A property that is true or not."""
    return Result(title, bool(condition), ok if condition else question)


def relative_rms(got, expected) -> float:
    """||got - expected|| / ||expected||; infinite where got is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300))


def several(title, got, count: int) -> Result | None:
    """A failed Result unless got is a tuple or list of `count` values."""
    if isinstance(got, (tuple, list)) and len(got) == count:
        return None
    shown = f"{len(got)} values" if isinstance(got, (tuple, list)) else type(got).__name__
    return Result(
        title,
        False,
        say(
            f"expected {count} values, came: {shown}.  What does the docstring promise to return?",
            f"应返回 {count} 个值，得到：{shown}。文档字符串里说要返回什么？",
        ),
    )


def _kind(title, got, expected) -> Result | None:
    """A failed Result if got is not an array of expected's shape."""
    expected = np.asarray(expected)
    try:
        got = np.asarray(got)
    except ValueError:  # rows of different lengths
        got = np.asarray(None)
    if got.dtype.kind not in "biuf":
        text = say(
            f"expected numbers of shape {expected.shape}, came {type(got).__name__} of {got.dtype}",
            f"应为形状 {expected.shape} 的数值，得到 {got.dtype}",
        )
        return Result(title, False, text, float("inf"))
    if got.shape != expected.shape:
        text = say(
            f"expected shape {expected.shape}, came {got.shape}.  ", f"形状应为 {expected.shape}，得到 {got.shape}。"
        )
        return Result(title, False, text + _shape_question(got.shape, expected.shape), float("inf"))
    return None


def _shape_question(got: tuple, expected: tuple) -> str:
    if sorted(got) == sorted(expected):
        return _turned()
    if got == expected[1:]:
        return say("The first axis is missing: what runs along it?", "少了第一个轴：沿着它排列的是什么？")
    if got == tuple(n for n in expected if n != 1):
        return say("An axis of length 1 is gone: look at keepdims.", "长度为 1 的轴不见了：看看 keepdims。")
    if len(got) == len(expected) > 0 and got[1:] == expected[1:] and 0 < got[0] < expected[0]:
        return say(
            "Which rows are missing?  Is the last piece shorter than the others?",
            "少了哪几行？最后一段是不是比别的短？",
        )
    return say("Which axis is summed, which one stays?", "哪个轴被求和，哪个轴保留？")


def _turned() -> str:
    return say(
        "The axes are in another order: which one comes first in the docstring?",
        "轴的次序不对：文档字符串里哪个轴在最前？",
    )


def _first_difference(got, expected, same) -> list[str]:
    index = tuple(int(i) for i in np.argwhere(~same)[0])
    if not index:
        return [
            say(f"expected {_number(expected)}, came {_number(got)}", f"应为 {_number(expected)}，得到 {_number(got)}")
        ]
    at, want, came = list(index), _number(expected[index]), _number(got[index])
    return [
        say(f"first difference at {at}: expected {want}, came {came}", f"第一处不同在 {at}：应为 {want}，得到 {came}")
    ]


def _number(x) -> str:
    return f"{float(x):.6g}"


def _question(got, expected, mistakes, limit: float) -> list[str]:
    """The question of the mistake that would give exactly this, if one of them does."""
    with np.errstate(all="ignore"):
        mistakes = mistakes() if callable(mistakes) else mistakes
    for wrong, question in mistakes:
        wrong = np.asarray(wrong, np.float64)
        if wrong.shape == got.shape and np.allclose(got, wrong, rtol=limit, atol=limit, equal_nan=True):
            return [question]
    if got.ndim > 1 and got.T.shape == got.shape and np.allclose(got.T, expected, rtol=limit, atol=limit):
        return [_turned()]
    if not np.isfinite(got).all():
        return [say("It is not finite: which exponent can grow without bound?", "结果不是有限数：哪个指数会无界增长？")]
    return [
        say(
            "Go through the smallest case by hand: what should this entry be, term by term?",
            "用最小的例子手算一遍：这个元素应当由哪几项相加？",
        )
    ]
