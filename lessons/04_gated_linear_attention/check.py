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
        (
            expected(q, v, k, log_g, state),
            say(
                "Row i of the state belongs to channel i of the key: is yours transposed, or are k and v exchanged?",
                "状态的第 i 行属于键的第 i 个通道：你的状态是不是转置了，或者 k 和 v 写反了？",
            ),
        ),
        (
            expected(q, np.ones_like(k), k * v, log_g, state),
            say(
                "k * v multiplies entry by entry.  What shape has k_t v_t^T, and what is its entry (i, j)?",
                "k * v 是逐元素相乘。外积 k_t v_t^T 是什么形状，它的第 (i, j) 个元素是什么？",
            ),
        ),
        (
            expected(q, k, v, np.broadcast_to(log_g.mean(1, keepdims=True), log_g.shape), state),
            say("Has every channel a gate of its own?", "每个通道都有自己的门控吗？"),
        ),
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
    before = say("Have all tokens been written into the state that you return?", "返回的状态里，所有词元都写进去了吗？")
    return outputs, [*states, (expected(q, k, v, log_g, state)[1][-2], before)]


def pair(title, got, args, limit=FLOAT64, more=lambda: ((), ())):
    """Results for (o, last state) as returned by gla_recurrent and gla_chunk.  more: further mistakes of both."""
    failed = several(title, got, 2)
    if failed:
        yield failed
        return
    o, states = expected(*args)
    for place, what, want in ((0, say(": outputs", "：输出"), o), (1, say(": last state", "：最后的状态"), states[-1])):
        guesses = lambda place=place: [*mistakes(*args)[place], *more()[place]]  # noqa: E731
        yield close(title + what, got[place], want, limit, guesses)


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
        (6, 23, np.float64, FLOAT64),
        (5, 1, np.float64, FLOAT64),
        (7, 130, np.float32, FLOAT32),
    ):
        *qkvg, state = inputs(key, T, 6, dtype)
        if T == 23:
            yield sees_no_later_token(f, qkvg)
        args = (*qkvg, 0 * state)
        title = say(f"{T} tokens" if T > 1 else "a single token", f"{T} 个词元")
        yield close(title, f(*qkvg), expected(*args)[0], limit, lambda args=args: parallel_mistakes(*args))
    *qkvg, state = strong(11, 130, 6)
    want = expected(*qkvg, 0 * state)[0]
    title = say("stability: very strong gates", "稳定性：门控非常强")
    yield close(title, f(*qkvg), want, FLOAT32, lambda: strong_mistakes(*qkvg))


def strong(key, T, D, divisor=1.0, shift=8.0):
    """inputs() in float32 with every log_g lower by `shift`: exp of a positive difference overflows, in float64 too."""
    *qkv, log_g, state = inputs(key, T, D, np.float32, divisor)
    return [*qkv, log_g - np.float32(shift), state]


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
    b = np.cumsum(log_g, 0)
    return [
        (
            o - own,
            say(
                "Does a token see itself (s = t)?  What does the formula of o_t say?",
                "词元能看到自己吗（s = t）？o_t 的公式怎么说？",
            ),
        ),
        *mistakes(q, k, v, log_g, state)[0],
        (
            scale * np.tril(np.einsum("td,sd,tsd->ts", q, k, np.exp(log_g[:, None] - log_g[None]))) @ v,
            say("Is the exponent made of log_g or of its running sum b?", "指数里用的是 log_g，还是它的累加和 b？"),
        ),
        (
            scale * np.tril((q * np.exp(b)) @ k.T) @ v,
            say(
                "Your weight fades from the first token to the reader.  Which gates lie between s and t?",
                "你的权重从第一个词元一直衰减到读者。s 与 t 之间有哪些门控？",
            ),
        ),
    ]


def strong_mistakes(q, k, v, log_g):
    """What comes of exponents that are positive, in float32 and in float64."""
    after, apart = (
        say(
            "Infinity times 0 is not 0: is the mask there before you take exp, or after it?",
            "无穷大乘以 0 不等于 0：掩码是在取 exp 之前加的，还是之后？",
        ),
        say(
            "exp(-b_s) alone is infinite here: is exp taken of the difference b_t - b_s, or of each part?",
            "单独的 exp(-b_s) 在这里是无穷大：exp 是对差 b_t - b_s 取的，还是分别取的？",
        ),
    )
    found = []
    for dtype in (np.float32, np.float64):
        b = np.cumsum(log_g.astype(dtype), 0)
        allowed = np.tri(len(b), dtype=dtype)
        decay = np.exp(b[:, None] - b[None]) * allowed[..., None]
        found.append((q.shape[1] ** -0.5 * np.einsum("td,sd,tsd->ts", q, k, decay) @ v, after))
        for masked in (np.tril, lambda weights, allowed=allowed: weights * allowed):
            found.append((q.shape[1] ** -0.5 * masked((q * np.exp(b)) @ (k * np.exp(-b)).T) @ v, apart))
    return found


@exercise
def gla_chunk(f):
    args = inputs(8, 37, 6)
    for chunk in (8, 1, 64):
        title = say(f"37 tokens in chunks of {chunk}", f"37 个词元，每块 {chunk} 个")
        yield from chunked(title, f(*args, chunk), args, chunk)
    args = inputs(9, 130, 16, np.float32)
    title = say("130 tokens in chunks of 32", "130 个词元，每块 32 个")
    yield from chunked(title, f(*args, 32), args, 32, FLOAT32)
    for shift, text in (
        (0, say("stability: gates without the divisor, chunks of 128", "稳定性：门控不带除数，每块 128 个")),
        (8, say("stability: very strong gates, chunks of 128", "稳定性：门控非常强，每块 128 个")),
    ):
        args = strong(10, 300, 8, shift=shift)
        yield from chunked(text, f(*args, 128), args, 128, FLOAT32)


def chunked(title, got, args, chunk, limit=FLOAT64):
    """pair(), with the questions of mistakes that only chunks allow."""
    yield from pair(title, got, args, limit, lambda: chunk_mistakes(*args, chunk))


def chunk_mistakes(q, k, v, log_g, state, chunk):
    """-> mistakes of the outputs, of the last state."""
    args = (q, k, v, log_g, state)
    o, states = expected(*args)
    starts = range(0, len(q), chunk)
    b = np.vstack([np.cumsum(log_g[start : start + chunk], 0, dtype=np.float64) for start in starts])
    older = np.repeat([states[start] for start in starts], chunk, axis=0)[: len(q)]  # the state a chunk begins with

    def read(query):
        return q.shape[1] ** -0.5 * np.einsum("td,tde->te", query, older)

    right, whole = read(q * np.exp(b)), len(q) // chunk * chunk
    fade = say(
        "The state is as old as the chunk's start: by what has it faded when token t reads it?",
        "状态停留在块的开头：到词元 t 读它时，它衰减了多少？",
    )
    sign = say(
        "Your state grows on its way from the chunk's start to token t: which sign has the exponent?",
        "你的状态从块的开头走到词元 t 时变大了：指数的符号对吗？",
    )
    past = say(
        "What do the tokens of a chunk read of the state that came before it?", "块内的词元从之前的状态里读到了什么？"
    )
    scale = say("Is the factor D^-0.5 on both parts of the outputs?", "输出的两部分都乘上系数 D^-0.5 了吗？")
    rest = say("What becomes of the tokens after the last whole chunk?", "最后一个完整的块之后，剩下的词元怎么办？")
    wrong = [
        (o - right + read(q), states[-1], fade),
        (o - right + read(q * np.exp(-b)), states[-1], sign),
        (o - right, states[-1], past),
        (np.vstack([o[:chunk], (o - right)[chunk:]]), hand_on(args, chunk, lambda *new: new[2])[1], past),
        (o - right + q.shape[1] ** 0.5 * right, states[-1], scale),
        (np.vstack([o[:whole], 0 * o[whole:]]), states[whole], rest),
        (
            *hand_on(args, chunk, lambda old, new, inner, k, v: new - inner + k.T @ v),
            say(
                "A key that was written early in the chunk has faded by the chunk's end: by what?",
                "块内较早写入的键，到块的末尾已经衰减：衰减了多少？",
            ),
        ),
        (
            *hand_on(args, chunk, lambda old, new, inner, k, v: old + inner),
            say("Through a whole chunk the old state fades, too: by what?", "穿过整个块时，旧状态也要衰减：衰减多少？"),
        ),
        (
            *hand_on(args, chunk, lambda old, new, inner, k, v: inner),
            say("What becomes of the state that the chunk was given?", "传给这一块的状态去哪了？"),
        ),
        (
            *hand_on(args, chunk, lambda old, new, inner, k, v: new, late=True),
            say(
                "Which state do a chunk's outputs read: the one before the chunk, or the one after it?",
                "块的输出读的是块之前的状态，还是块之后的状态？",
            ),
        ),
    ]
    return [(o, question) for o, _, question in wrong], [(last, question) for _, last, question in wrong]


def hand_on(args, chunk, new_state, late=False):
    """-> o, the last state, if a chunk hands on new_state(old, right, what it wrote itself, k, v).

    late: the outputs read the state that the chunk leaves, not the one that it was given.
    """
    *tokens, state = [np.asarray(x, np.float64) for x in args]
    outputs = []
    for start in range(0, len(tokens[0]), chunk):
        q, k, v, log_g = (x[start : start + chunk] for x in tokens)
        o, states = expected(q, k, v, log_g, state)
        inner = expected(q, k, v, log_g, 0 * state)[1][-1]
        state = new_state(state, states[-1], inner, k, v)
        outputs.append(expected(q, k, v, log_g, state)[0] if late else o)
    return np.vstack(outputs), state


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
