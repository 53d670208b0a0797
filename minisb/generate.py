"""Text from a model: read the prompt in pieces, then one token at a time, in constant memory."""

from __future__ import annotations

import numpy as np

from minisb.backend import on_host
from minisb.errors import MinisbError

#: Tokens of a prompt read at once: long enough for matrix products, short enough that a long
#: prompt needs no more memory than a short one.
PIECE = 256


def sample_token(logits, rng, temperature: float = 0.8, top_k: int | None = None, top_p: float = 1.0) -> int:
    """Draw one token id from logits (V,).

    temperature: 0 takes the most likely token; 1 draws from the model's own distribution.
    top_k: only the k most likely tokens (None: all).  top_p: of those, only the smallest set of
    most likely tokens that holds at least this share of the probability.
    rng: a numpy Generator; exactly one number is drawn from it a token, none at temperature 0.
    The softmax is taken in float64: over a large vocabulary the tail would be lost in float32.
    MinisbError for settings outside their range and for logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    logits = np.asarray(logits, np.float64)
    top = logits.max()
    if not np.isfinite(top):
        raise MinisbError("the model's logits are not finite: this checkpoint is damaged or its training diverged.")
    if temperature == 0:
        return int(logits.argmax())
    ids = None  # of what is left, once something is left out
    if top_k is not None and top_k < logits.size:
        ids = np.argpartition(logits, -top_k)[-top_k:]
    p = (logits if ids is None else logits[ids]) - top
    p /= temperature
    np.exp(p, out=p)
    if top_p < 1:
        # Sorting a whole vocabulary takes longer than a step on a GPU.  Tokens this unlikely hold together at most
        # half of what top-p leaves out, so none of them is kept.
        total = p.sum()
        likely = np.flatnonzero(p > (1 - top_p) * total / (2 * p.size))
        likely_first = likely[np.argsort(-p[likely], kind="stable")]
        before = np.cumsum(p[likely_first]) - p[likely_first]
        kept = likely_first[before < top_p * total]  # the first is always in: nothing is before it
        ids, p = kept if ids is None else ids[kept], p[kept]
    cumulative = np.cumsum(p)
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(place if ids is None else ids[place])


def generate(
    model,
    prompt_ids,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    spike=False,
    stop: int | None = None,
    state=None,
):
    """Continue a prompt: an iterator over at most `tokens` new token ids, each ready to print.

    prompt_ids: token ids; an empty prompt starts from the end-of-text id, as documents did in
        training: `stop`, or the one of model.tokenizer, which minisb.load puts there.
    stop: the end-of-text id; it ends the text and is not handed out.  None: never stop early.
    spike: False, True, or names of projections, as in SpikingBrain.forward.
    state: a DecodeState of batch 1 to go on from (None: a new one); it is updated, so the caller
        can look at its size or continue the text with another call.  The last token handed out
        has not been read into it yet: begin the next prompt with that token.
    Same model, prompt, settings and seed: same tokens.  MinisbError at once for bad arguments.
    """
    check_sampling(temperature, top_k, top_p)
    if tokens < 0:
        raise MinisbError(f"the number of tokens must be at least 0, got {tokens}.")
    prompt = _checked_prompt(model, prompt_ids, stop)
    state = model.new_state() if state is None else state
    rng = np.random.default_rng(seed)
    return _decode(model, prompt, tokens, state, spike, stop, lambda x: sample_token(x, rng, temperature, top_k, top_p))


def read_prompt(model, prompt, state, spike=False, piece: int = PIECE):
    """Prefill `state` with the ids in prompt (T,), a piece at a time -> logits (V,) of the last."""
    for start in range(0, len(prompt), piece):
        part = model.be.xp.asarray(prompt[None, start : start + piece], "int32")
        logits = model.prefill(part, state, spike)
    return on_host(logits[0])


def check_sampling(temperature: float, top_k: int | None, top_p: float):
    """MinisbError for settings of sample_token outside their range (NaN included)."""
    if not 0 <= temperature < float("inf"):
        raise MinisbError(f"temperature must be at least 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise MinisbError(f"top-k must be at least 1, got {top_k}.")
    if not 0 < top_p <= 1:
        raise MinisbError(f"top-p must be above 0 and at most 1, got {top_p}.")


def _decode(model, prompt, tokens, state, spike, stop, draw):
    """The loop of generate: nothing is computed before the first token is asked for."""
    if tokens == 0:
        return
    logits = read_prompt(model, prompt, state, spike)
    step = _stepper(model, state, spike)
    for left in range(tokens, 0, -1):
        token = draw(logits)
        if token == stop:
            return
        yield token
        if left > 1:
            logits = step(token)


def _stepper(model, state, spike):
    """A function: token -> logits (V,), after a step of `state`; on a GPU it is recorded where that can be."""
    if model.be.name == "cuda":
        from minisb.recorded_step import RecordedStep, can_record  # here: nobody else needs the launchers

        if can_record(model):
            step = RecordedStep(model, state, spike)
            return lambda token: step([token])[0]
    xp = model.be.xp
    return lambda token: on_host(model.step(xp.asarray([token], "int32"), state, spike)[0])


def _checked_prompt(model, prompt_ids, stop):
    """The prompt as an array (T,), T >= 1."""
    prompt, vocab = np.asarray(list(prompt_ids)), model.config.vocab
    if not prompt.size:
        prompt = np.array([_start_token(model, stop)])
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise MinisbError("a prompt is a sequence of token ids, whole numbers.")
    outside = prompt[(prompt < 0) | (prompt >= vocab)]
    if outside.size:
        raise MinisbError(f"token id {outside[0]} is outside the model's vocabulary of {vocab}.")
    return prompt


def _start_token(model, stop):
    tokenizer = getattr(model, "tokenizer", None)
    if stop is None and tokenizer is None:
        raise MinisbError("an empty prompt needs a token to start from: give the end-of-text id as stop.")
    return tokenizer.eot if stop is None else stop
