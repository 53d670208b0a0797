"""Checks of lesson 04.  Expected values come from the package's step-by-step definition, in float64."""

import numpy as np

from lessons._lib.calls import StudentFailed
from lessons._lib.checks import Limit, close, exercise, holds, relative_rms, several
from lessons._lib.conventions import Convention, flipped, rng
from lessons._lib.language import say
from lessons._lib.pictures import heat, side_by_side
from minisb.backend import Backend
from minisb.ops.gla import gla_recurrent_forward

REFUSED = ("minisb.ops.gla", "minisb.cpu.gla")
CONVENTIONS = (
    Convention(
        "gate on the value side",
        "S_t = diag(g_t) S_{t-1} + k_t v_t^T",
        "S_t = S_{t-1} diag(g_t) + k_t v_t^T",
        "the gate fades the columns of the state (value channels), not its rows (key channels)",
        "门控衰减的是状态的列（值通道），而不是行（键通道）",
    ),
    Convention(
        "read before writing",
        "o_t = D^-0.5 * q_t S_t",
        "o_t = D^-0.5 * q_t S_{t-1}",
        "a token reads the state as it was before this token: it does not see itself, nor its own gate",
        "词元读取的是它到来之前的状态：它看不到自己，也不受自己的门控影响",
    ),
)
# The nearest wrong answer is the smallest error of a mutant in lessons/_ci/mutants.py.
FLOAT64 = Limit(1e-12, right=1e-14, wrong=0.06)
FLOAT32 = Limit(1e-5, right=1e-6, wrong=0.04, dtype="float32")


def expected(q, k, v, log_g, state, flips=None):
    """-> o (T,D), every state (T+1,D,D), in float64, by the package's definition.

    flips: the conventions that are flipped, by default this course's.
    """
    q, k, v, log_g, state = (np.asarray(x, np.float64) for x in (q, k, v, log_g, state))
    flips = flipped(CONVENTIONS) if flips is None else flips
    columns = "gate on the value side" in flips
    if columns:  # the transposed state has its gate on the rows
        k, v, state = v, k, state.T
    one = [x[None, :, None] for x in (q, k, v, log_g)]
    states = gla_recurrent_forward(Backend(1), *one, state[None, None])[2][:, 0, 0]
    states = states.swapaxes(1, 2) if columns else states
    read = states[:-1] if "read before writing" in flips else states[1:]
    return q.shape[1] ** -0.5 * np.einsum("td,tde->te", q, read), states


def inputs(key, T, D, dtype=np.float64, divisor=2.0):
    """q, k, v, log_g (T,D) and a state (D,D).  log_g = logsigmoid(z) / divisor, the released model's is 16."""
    random = rng(4, key)
    q, k, v, z = random.standard_normal((4, T, D))
    log_g = -np.logaddexp(0, -z) / divisor
    return [x.astype(dtype) for x in (q, k, v, log_g, random.standard_normal((D, D)))]


def mistakes(q, k, v, log_g, state):
    """What likely mistakes would give, with a question each: o (T,D), the last state (D,D)."""
    late = np.vstack([0 * log_g[:1], log_g[:-1]])
    gate, order = (flipped(CONVENTIONS) ^ {convention.name} for convention in CONVENTIONS)
    given = (
        (
            expected(q, k, v, log_g, state, gate),
            say(
                "Does g fade the rows of the state or its columns?  Which axis is the key's?",
                "g 衰减的是状态的行还是列？哪个轴是键的轴？",
            ),
        ),
        (
            expected(q, k, v, log_g, state, order),
            say(
                "Is o_t read from S_t or from S_{t-1}?  Read the docstring's last line.",
                "o_t 是从 S_t 读出，还是从 S_{t-1} 读出？再看文档字符串里的公式。",
            ),
        ),
        (
            expected(q, k, v, -log_g, state),
            say(
                "Does g = exp(log_g) make the old state smaller or larger?", "g = exp(log_g) 应当让旧状态变小还是变大？"
            ),
        ),
        (expected(q, k, v, 0 * log_g, state), say("Where does log_g enter your code?", "你的代码在哪里用到了 log_g？")),
        (
            expected(q, k, v, late, state),
            say(
                "Which gate fades S_{t-1}: that of token t or of token t-1?",
                "使 S_{t-1} 衰减的是第 t 个词元的门控，还是第 t-1 个的？",
            ),
        ),
        (
            expected(q, k * np.exp(log_g), v, log_g, state),
            say("Does a token's own gate fade what this token writes?", "词元自己的门控会衰减它自己写入的内容吗？"),
        ),
        (expected(q, v, k, log_g, state), say("Are k and v in their places?", "k 和 v 的位置对吗？")),
        (
            expected(q, k, v, log_g, 0 * state),
            say("What becomes of the state that you were given?", "传入的状态去哪了？"),
        ),
        (
            (expected(q, k, v, log_g, state)[0] * q.shape[1] ** 0.5, None),
            say("Is the factor D^-0.5 there?", "系数 D^-0.5 乘上了吗？"),
        ),
    )
    outputs = [(got[0], question) for got, question in given]
    states = [(got[1][-1], question) for got, question in given if got[1] is not None]
    return outputs, states


def pair(title, got, args, limit=FLOAT64):
    """Results for (o, last state) as returned by gla_recurrent and gla_chunk."""
    failed = several(title, got, 2)
    if failed:
        yield failed
        return
    o, states = expected(*args)
    yield close(title + say(": outputs", "：输出"), got[0], o, limit, lambda: mistakes(*args)[0])
    yield close(title + say(": last state", "：最后的状态"), got[1], states[-1], limit, lambda: mistakes(*args)[1])


@exercise
def gla_step(f):
    for title, empty in (
        (say("a token, an empty state", "一个词元，空状态"), 0.0),
        (say("a token, a full state", "一个词元，已有状态"), 1.0),
    ):
        q, k, v, log_g, state = inputs(1, 1, 5)
        args = (q, k, v, log_g, state * empty)
        got = f(q[0], k[0], v[0], log_g[0], state * empty)
        failed = several(title, got, 2)
        if failed:
            yield failed
            return
        o, states = expected(*args)
        outputs = [(wrong[0], question) for wrong, question in mistakes(*args)[0]]
        yield close(title + say(": new state", "：新状态"), got[1], states[-1], FLOAT64, mistakes(*args)[1])
        yield close(title + say(": output", "：输出"), got[0], o[0], FLOAT64, outputs)


@exercise
def gla_recurrent(f):
    args = inputs(2, 11, 6)
    yield from pair(say("11 tokens", "11 个词元"), f(*args), args)
    args = inputs(3, 1, 3)
    yield from pair(say("a single token", "只有一个词元"), f(*args), args)
    args = inputs(4, 130, 16, np.float32)
    yield from pair(say("130 tokens", "130 个词元"), f(*args), args, FLOAT32)


@exercise
def gla_parallel(f):
    for key, T, dtype, limit in (
        (5, 1, np.float64, FLOAT64),
        (6, 23, np.float64, FLOAT64),
        (7, 130, np.float32, FLOAT32),
    ):
        *qkvg, state = inputs(key, T, 6, dtype)
        if T == 23:
            yield sees_no_later_token(f, qkvg)
        args = (*qkvg, 0 * state)
        title = say(f"{T} tokens", f"{T} 个词元")
        yield close(title, f(*qkvg), expected(*args)[0], limit, lambda args=args: parallel_mistakes(*args))


def sees_no_later_token(f, qkvg):
    later = [np.concatenate([x[:15], x[15:][::-1]]) for x in qkvg]
    same = np.array_equal(np.asarray(f(*later))[:15], np.asarray(f(*qkvg))[:15])
    title = say(
        "tokens 15 to 22 reversed: outputs 0 to 14 keep every bit",
        "把第 15 到 22 个词元倒过来：第 0 到 14 个输出逐位不变",
    )
    question = say("Can a token see a later one?  Where is that cut off?", "词元能看到后面的词元吗？在哪里截断？")
    return holds(title, same, question=question)


def parallel_mistakes(q, k, v, log_g, state):
    scale = q.shape[1] ** -0.5
    own = scale * (q * k).sum(1, keepdims=True) * v  # the diagonal
    o = expected(q, k, v, log_g, state)[0]
    return [
        (
            o - own,
            say(
                "Does a token see itself (s = t)?  What does the formula of o_t say?",
                "词元能看到自己吗（s = t）？o_t 的公式怎么说？",
            ),
        ),
        *mistakes(q, k, v, log_g, state)[0],
    ]


@exercise
def gla_chunk(f):
    args = inputs(8, 37, 6)
    for chunk in (8, 1, 64):
        title = say(f"37 tokens in chunks of {chunk}", f"37 个词元，每块 {chunk} 个")
        yield from pair(title, f(*args, chunk), args)
    args = inputs(9, 130, 16, np.float32)
    yield from pair(say("130 tokens in chunks of 32", "130 个词元，每块 32 个"), f(*args, 32), args, FLOAT32)
    for shift, text in ((0, ""), (8, say(", far stronger gates", "，门控强得多"))):
        args = inputs(10, 300, 8, np.float32, divisor=1.0)
        args[3] = args[3] - np.float32(shift)
        title = say("stability: gate divisor 1, chunks of 128", "稳定性：门控除数 1，每块 128 个") + text
        yield from pair(title, f(*args, 128), args, FLOAT32)


# --- the picture -----------------------------------------------------------------------------------

FORMS = ("gla_recurrent", "gla_parallel", "gla_chunk")
TOKENS = 24


def show(student, plt):
    """How much each token (across) reaches each output (down): by every form, and by the reference.

    With v = the identity matrix (D = T), o[t, s] is exactly the weight of token s in output t.
    """
    random = rng(4, 99)
    q, k = random.random((2, TOKENS, TOKENS))
    log_g = -np.abs(random.standard_normal((TOKENS, TOKENS))) / 6
    v, empty = np.eye(TOKENS), np.zeros((TOKENS, TOKENS))
    reference = expected(q, k, v, log_g, empty)[0]
    images = {"reference": reference}
    for name in FORMS:
        extra = {"gla_recurrent": (empty,), "gla_parallel": (), "gla_chunk": (empty, 8)}[name]
        try:
            got = student(name)(q, k, v, log_g, *extra)
            images[name] = np.asarray(got if name == "gla_parallel" else got[0], np.float64)
        except StudentFailed as failed:
            images[f"{name}: {failed.kind}"] = np.zeros_like(reference)
    if plt is None:
        return side_by_side(images.items())
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    for ax, (title, image) in zip(axes, images.items(), strict=True):
        off = relative_rms(image, reference) if image.shape == reference.shape else np.inf
        known = title == "reference" or ":" in title
        heat(
            ax,
            image,
            title if known else f"your {title}\noff by {off:.1e}",
            "token s",
            "output t",
            vmin=0,
            vmax=reference.max(),
        )
    return figure
