"""Checks of lesson 10.  Rows are scaled by 10^U(-1,1): on equal rows one threshold for all looks right."""

import numpy as np

from lessons._lib.calls import StudentFailed
from lessons._lib.checks import Limit, close, exact, exercise, several
from lessons._lib.conventions import Convention, flipped, rng
from lessons._lib.language import say
from lessons._lib.pictures import REFERENCE, STUDENT, raster, side_by_side
from minisb.backend import Backend
from minisb.ops import spike
from minisb.ops.neuron import adaptive_neuron, over_excited_share, silent_share

REFUSED = ("minisb.ops.spike", "minisb.ops.neuron", "minisb.cpu.spike")
CONVENTIONS = (
    Convention(
        "ties up",
        "a tie (1.5, 2.5) goes to the even one",
        "a tie goes up (1.5 to 2, 2.5 to 3, -1.5 to -1)",
        "at a tie the count is rounded up, not to the even number",
        "恰好在两个整数中间时向上取整，而不是取偶数",
    ),
    Convention(
        "root mean square",
        "Vth = mean |x| / k over the channels of a token",
        "Vth = sqrt(mean x^2) / k over the channels of a token",
        "the threshold is taken from the root mean square of a token, not from its mean magnitude",
        "阈值取自词元的均方根，而不是绝对值的均值",
    ),
)
FLOAT64 = Limit(1e-12, right=1e-14, wrong=0.3)
BOUNDS = spike.VTH_MIN, spike.VTH_MAX
BE = Backend(1)


def expected_threshold(x, k, rms=None):
    rms = "root mean square" in flipped(CONVENTIONS) if rms is None else rms
    if rms:
        return np.clip(np.sqrt((x * x).mean(-1, keepdims=True)) / k, *BOUNDS)
    return spike.threshold(BE, x, k)


def expected_count(x, vth):
    if "ties up" in flipped(CONVENTIONS):
        return np.floor(x / vth + 0.5)
    return spike.spike_count(BE, x, vth)


def tokens(key, N, C):
    """Activations (N,C) as they are: most of them small, a few large, and every token at its own scale."""
    random = rng(10, key)
    return random.laplace(size=(N, C)) * 10.0 ** random.uniform(-1, 1, (N, 1))


@exercise
def threshold(f):
    x = tokens(1, 6, 40)
    for k in (3.0, 0.5):
        want = expected_threshold(x, k)
        yield close(f"k = {k}", f(x, k), want, FLOAT64, lambda x=x, k=k, want=want: threshold_mistakes(x, k, want))
    extreme = np.array([[0.0, 0.0, 0.0], [1e-9, -2e-9, 3e-9], [3e5, -1e5, 2e5], [1.0, -2.0, 4.0]])
    title = say("an empty token, a tiny one, a huge one", "全零的、极小的、极大的词元")
    question = say("Is Vth kept between 1e-5 and 1e4?", "Vth 是否限制在 1e-5 与 1e4 之间？")
    before = say(
        "Vth itself stays between 1e-5 and 1e4.  Do you bound it, or the mean before it is divided by k?",
        "要限制在 1e-5 与 1e4 之间的是 Vth 本身。你限制的是它，还是除以 k 之前的均值？",
    )
    want = expected_threshold(extreme, 3.0)
    got = np.asarray(f(extreme, 3.0))
    ratio = got / want if got.shape == want.shape else got
    yield close(
        title + say(": Vth divided by the right one", "：Vth 除以正确值"),
        ratio,
        np.ones_like(want),
        FLOAT64,
        lambda: [(expected_threshold(extreme, 1.0) / 3.0 / want, before), (ratio, question)],
    )


def threshold_mistakes(x, k, want):
    other = expected_threshold(x, k, rms="root mean square" not in flipped(CONVENTIONS))
    negative = say("What happens to negative activations in your mean?", "求均值时负的激活值怎么办？")
    return [
        (
            np.full_like(want, np.abs(x).mean() / k),
            say(
                "Is every token given the same threshold?  Over which axis is the mean?",
                "所有词元的阈值都一样吗？均值是沿哪个轴取的？",
            ),
        ),
        (
            np.abs(x.mean(1, keepdims=True)) / k,
            say("Is the magnitude taken before the mean or after it?", "绝对值是在求均值之前取，还是之后？"),
        ),
        (x.mean(1, keepdims=True) / k, negative),
        (np.clip(x.mean(1, keepdims=True) / k, *BOUNDS), negative),
        (
            np.abs(x).sum(1, keepdims=True) / k,
            say("Is that the mean over the channels, or their sum?", "这是对通道求的均值，还是总和？"),
        ),
        (
            np.abs(x).max(1, keepdims=True) / k,
            say("Is that the mean over the channels, or the largest?", "这是对通道求的均值，还是最大值？"),
        ),
        (want * k, say("Where does k enter?", "k 用在哪里？")),
        (want * k * k, say("Is k a factor or a divisor?", "k 是乘数还是除数？")),
        (
            other,
            say(
                "Mean magnitude or root mean square: which one does the convention ask for?",
                "约定里要的是绝对值的均值，还是均方根？",
            ),
        ),
    ]


@exercise
def spike_count(f):
    x = tokens(2, 5, 30)
    vth = expected_threshold(x, 2.0)
    yield exact(
        say("every token at its own scale", "每个词元各有尺度"),
        f(x, vth),
        expected_count(x, vth),
        count_mistakes(x, vth),
    )
    halves = np.arange(-11, 12)[None] * np.array([[0.5], [2.0]])
    vth = np.array([[1.0], [4.0]])
    title = say("ties: x / Vth = -5.5, -5, ... 5.5", "恰在中间：x / Vth = -5.5、-5、……、5.5")
    yield exact(title, f(halves, vth), expected_count(halves, vth), count_mistakes(halves, vth))


def count_mistakes(x, vth):
    ratio = x / vth
    tie = say(
        "Where does 2.5 go?  What does the convention say of a tie?", "2.5 取成几？约定里对恰在中间的情况怎么说？"
    )
    return [
        (
            np.floor(ratio),
            say("Is floor rounding?  Where does 1.9 go, and -0.1?", "floor 是四舍五入吗？1.9 取成几，-0.1 呢？"),
        ),
        (
            np.trunc(ratio),
            say("Your counts are cut towards zero: where should 1.9 go?", "你的计数被截向零：1.9 应取成几？"),
        ),
        (
            np.trunc(ratio + 0.5),
            say("One half more and then cut towards zero: where does -0.6 go?", "加二分之一再截向零：-0.6 取成几？"),
        ),
        (
            np.rint(x) / vth,
            say("Do you round x, or x / Vth?", "取整的是 x，还是 x / Vth？"),
        ),
        (np.abs(np.rint(ratio)), say("Where is the sign?", "符号去哪了？")),
        (np.clip(np.rint(ratio), 0, None), say("What becomes of negative activations?", "负的激活值怎么办？")),
        (
            np.rint(x / vth[:1]),
            say("Does every token use a threshold of its own?", "每个词元用的都是自己的阈值吗？"),
        ),
        (
            np.rint(ratio) * vth,
            say("That is count * Vth.  Which of the two is asked for?", "这是 计数 × Vth。题目要的是哪一个？"),
        ),
        (np.rint(ratio), tie),
        (np.floor(ratio + 0.5), tie),
        (np.sign(ratio) * np.floor(np.abs(ratio) + 0.5), tie),
    ]


@exercise
def simulate_neuron(f):
    # Sixteenths of thresholds that are powers of two: every sum is exact, so trains can be compared spike by spike.
    vth = np.array([[0.5], [1.0], [8.0]])
    x = rng(10, 3).integers(0, 16 * 6, (3, 9)) / 16 * vth
    x[:, :3] = vth * np.array([0, 1, 3])  # silence, and whole multiples: v >= vth has to fire
    for title, v0, steps in (
        (say("from v = 0", "从 v = 0 开始"), 0 * vth, 8),
        (say("from v = Vth / 2", "从 v = Vth / 2 开始"), vth / 2, 8),
        (say("only 3 steps", "只有 3 步"), 0 * vth, 3),
    ):
        want = adaptive_neuron(x, vth, steps, v0)
        got = f(x, vth, steps, v0)
        yield exact(title, got, want, lambda steps=steps, v0=v0: neuron_mistakes(x, vth, steps, v0))
    counts = np.asarray(f(x, vth, 8, 0 * vth)).sum(0)
    yield exact(
        say("from v = 0 the train sums up to floor(x / Vth)", "从 v = 0 开始，脉冲总数是 floor(x / Vth)"),
        counts,
        np.floor(x / vth),
    )
    off_ties = np.where(x / vth % 1 == 0.5, x + vth / 16, x)
    counts = np.asarray(f(off_ties, vth, 8, vth / 2)).sum(0)
    title = say("from v = Vth / 2 it sums up to x / Vth rounded", "从 v = Vth / 2 开始，总数是 x / Vth 四舍五入")
    yield exact(title, counts, np.rint(off_ties / vth))


def neuron_mistakes(x, vth, steps, v0):
    first = np.arange(steps)[:, None, None]
    reached = (v0 + x) / vth
    hard = adaptive_neuron(np.minimum(x + v0, vth), vth, steps, 0 * vth)
    strict = first < np.ceil(reached) - 1
    again, potential = [], v0 + 0 * x
    for _ in range(steps):
        again.append(potential + x >= vth)
        potential = potential + x - vth * again[-1]
    late = np.concatenate([0 * hard[:1], adaptive_neuron(x, vth, steps, v0)[:-1]])
    return [
        (
            hard,
            say("After a spike, does the potential fall by Vth or to zero?", "发放之后，电位是减去 Vth，还是归零？"),
        ),
        (strict, say("What happens where the potential is exactly Vth?", "电位恰好等于 Vth 时会怎样？")),
        (adaptive_neuron(x, vth, steps, 0 * vth), say("Where does v0 enter?", "v0 用在哪里？")),
        (late, say("Has the input arrived before the first step or after it?", "输入在第一步之前到达，还是之后？")),
        (again, say("Does the input come again in every step, or once?", "输入是每一步都来一次，还是只来一次？")),
        ((reached >= 1) & (first >= 0), say("Does a spike cost anything?", "发放一次脉冲有没有代价？")),
    ]


@exercise
def ste_backward(f):
    random = rng(10, 4)
    for k in (3.0, 0.7):
        x = tokens(5, 7, 12)
        w, dy = random.standard_normal((5, 12)), random.standard_normal((7, 5))
        got = f(dy, x, w, k)
        failed = several(f"k = {k}", got, 2)
        if failed:
            yield failed
            return
        vth = expected_threshold(x, k)
        count = expected_count(x, vth)
        yield close(
            f"k = {k}: dx",
            got[0],
            dy @ w,
            FLOAT64,
            [
                (
                    0 * x,
                    say(
                        "The true derivative is zero almost everywhere; what does straight-through put in its place?",
                        "真实的导数几乎处处为零；直通估计用什么代替它？",
                    ),
                ),
                (
                    dy @ w / vth,
                    say(
                        "Straight-through says dx = dx_hat.  Where does 1 / Vth come from?",
                        "直通估计说 dx = dx_hat。1 / Vth 从哪里来？",
                    ),
                ),
                (
                    dy @ w * (count != 0),
                    say("Do silent channels get a gradient, too?", "没有发放的通道也应得到梯度吗？"),
                ),
                *(
                    (
                        dy @ w * kept,
                        say(
                            "Here straight-through passes every entry on: where do yours stop?",
                            "这里的直通估计让每个元素都通过：你的在哪里被截断了？",
                        ),
                    )
                    for kept in (np.abs(x) < vth, np.abs(x) <= 1)
                ),
                (
                    dy @ w * vth,
                    say(
                        "Straight-through says dx = dx_hat.  Where does Vth come from?",
                        "直通估计说 dx = dx_hat。Vth 从哪里来？",
                    ),
                ),
            ],
        )
        yield close(
            f"k = {k}: dw",
            got[1],
            dy.T @ (count * vth),
            FLOAT64,
            [
                (
                    dy.T @ x,
                    say(
                        "Which input did the projection really read in the forward pass: x or x_hat?",
                        "前向时投影真正读到的是 x 还是 x_hat？",
                    ),
                ),
                (dy.T @ count, say("What does one spike stand for: 1, or Vth?", "一个脉冲代表多少：1，还是 Vth？")),
            ],
        )


# --- the picture -----------------------------------------------------------------------------------

SCALES = np.logspace(-1, 1, 25)
CHANNELS, STEPS, LONG = 14, 8, 7


def show(student, plt):
    """Where the spikes are: the student's raster of one token, and what a fixed threshold would do."""
    x = tokens(6, 1, CHANNELS)
    vth = expected_threshold(x, 2.0)
    reference = adaptive_neuron(x, vth, STEPS, vth / 2)[:, 0]
    try:
        magnitude = np.asarray(student("simulate_neuron")(np.abs(x), vth, STEPS, vth / 2))
        yours, title = (magnitude * np.sign(x))[:, 0], "your spikes of one token"
    except StudentFailed as failed:
        yours, title = 0 * reference, f"simulate_neuron: {failed.kind}"
    if plt is None:
        return side_by_side([(f"{title} (channels down, time across)", yours.T), ("reference", reference.T)])
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    raster(axes[0], yours, f"{title}\n(crosses: -1)", STUDENT)
    raster(axes[1], reference, "reference\n", REFERENCE)
    draw_shares(axes[2], *_student_or_reference(student))
    return figure


def _student_or_reference(student):
    try:
        probe = np.ones((1, 4))
        student("spike_count")(probe, student("threshold")(probe, 3.0))
    except StudentFailed:
        return expected_threshold, expected_count, "reference"
    return student("threshold"), student("spike_count"), "yours"


def draw_shares(ax, threshold_of, count_of, whose):
    """Silent and over-excited channels over the size of a token, with a fixed and an adaptive threshold."""
    x = rng(10, 7).laplace(size=(1, 2000)) * SCALES[:, None]
    middle = len(SCALES) // 2
    adaptive = np.asarray(threshold_of(x, 3.0))
    for vth, style, name in (
        (adaptive, "-", f"adaptive ({whose})"),
        (np.full_like(adaptive, adaptive[middle, 0]), "--", "fixed"),
    ):
        counts = np.asarray(count_of(x, vth))
        ax.plot(SCALES, silent_share(counts, -1), style, color=REFERENCE, label=f"silent, {name}")
        ax.plot(SCALES, over_excited_share(counts, LONG, -1), style, color=STUDENT, label=f"over {LONG} spikes, {name}")
    ax.set_xscale("log")
    ax.set_xlabel("size of the token")
    ax.set_ylabel("share of its channels")
    ax.set_ylim(-0.02, 1.02)
    ax.legend(frameon=False, fontsize=7, loc="upper center")
