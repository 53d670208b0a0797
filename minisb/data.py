"""Text to tokens on disk, and tokens to batches.

Batches are a pure function of (seed, step): nothing random is stored, and a resumed run reads
exactly what an uninterrupted one would have.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisb.cache import atomic_write, cache_folder
from minisb.corpus import documents_digest, load_corpus
from minisb.errors import MinisbError
from minisb.tokenizer import FORMAT, PATTERN, Tokenizer, train_bpe

CACHE_FORMAT = 1  # raise it when the token files change their meaning
PACKAGED = Path(__file__).parent / "assets" / "stdlib-4096.tiktoken"
PACKAGED_VOCAB = 4096
DISCOUNT = 0.75  # of the bigram baseline; the usual value, never tuned on validation data


# --- tokenizers


def default_tokenizer(name_or_path, vocab_size=PACKAGED_VOCAB):
    """The tokenizer of a corpus -> Tokenizer with `vocab_size` tokens, the special one included.

    `stdlib` with 4096 has packaged ranks, the same on every machine. Anything else learns its own
    from the training split, once: the result is cached under a hash of that text. Text too small
    for the vocabulary gives fewer tokens: size the model by the tokenizer's own vocab_size.
    """
    if str(name_or_path) == "stdlib" and vocab_size == PACKAGED_VOCAB:
        return Tokenizer.load(PACKAGED)
    train = load_corpus(name_or_path).train
    key = _hash(FORMAT, PATTERN, vocab_size, documents_digest(train))
    path = cache_folder() / "tokenizers" / f"{key}.tiktoken"
    if not path.exists():
        Tokenizer(train_bpe((text for _, text in train), vocab_size)).save(path)
    return Tokenizer.load(path)


def _hash(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# --- tokens


@dataclass(frozen=True)
class TokenData:
    """Ids of both splits, 1-D and memory-mapped (uint16, or uint32 above 65,536 tokens), and their text in bytes.

    loss in nats per token * len(val) / val_bytes / ln 2 is bits per byte.
    """

    train: np.ndarray
    val: np.ndarray
    train_bytes: int
    val_bytes: int


def load_tokens(name_or_path, tokenizer):
    """Corpus -> TokenData, encoded on the first call and mapped from the cache ever after.

    Each document ends with the eot token, which counts no byte of text. The cache's key is a hash
    of the text itself, the tokenizer and the format, so a changed file is encoded anew.
    """
    corpus = load_corpus(name_or_path)
    train = _cached_tokens(corpus.train, tokenizer)
    val = _cached_tokens(corpus.val, tokenizer)
    return TokenData(train, val, corpus.train_bytes, corpus.val_bytes)


def _cached_tokens(documents, tokenizer):
    key = _hash(CACHE_FORMAT, documents_digest(documents), tokenizer.digest)
    path = cache_folder() / "tokens" / f"{key}.npy"
    if not path.exists():
        ids = _encode_documents(documents, tokenizer)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, ids)
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise MinisbError(f"the cached tokens {path} are damaged: delete that file and run again") from error


def _encode_documents(documents, tokenizer):
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces = [np.empty(0, dtype)]
    total = sum(len(text) for _, text in documents)
    with tqdm(total=total, unit="char", unit_scale=True, desc="encode", disable=None) as bar:
        for _, text in documents:
            pieces.append(np.array([*tokenizer.encode_ordinary(text), tokenizer.eot], dtype))
            bar.update(len(text))
    return np.concatenate(pieces)


# --- batches


def batch(tokens, batch_size, seq_len, seed, step):
    """Training batch number `step` (from 0) -> inputs, targets, each (B,T) int32; targets are inputs one later.

    Samples run through epochs: in each, the tokens are a ring, cut at a random place into windows
    of T that do not overlap, in random order. So an epoch reads no token twice and leaves out fewer
    than T, other ones each time; a batch may span two epochs. Depends on the arguments alone.
    MinisbError if there are fewer than T + 1 tokens, or the seed is negative.
    """
    _check_shape(tokens, batch_size, seq_len)
    if seed < 0:
        raise MinisbError(f"the seed must be 0 or more, not {seed}")
    windows = len(tokens) // seq_len
    starts = np.empty((batch_size, 1), np.int64)
    for row, sample in enumerate(range(step * batch_size, (step + 1) * batch_size)):
        epoch, place = divmod(sample, windows)
        cut, order = _epoch(seed, epoch, windows, len(tokens))
        starts[row] = cut + order[place] * seq_len
    return _windows(tokens, starts, seq_len)


@functools.lru_cache(maxsize=4)
def _epoch(seed, epoch, windows, length):
    """Where the ring of `length` tokens is cut, and the order of the windows (windows,) in this epoch."""
    # Raw output is the one thing that NumPy promises never to change; shuffles may change with a release.
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(windows + 1)
    return int(raw[0] % np.uint64(length)), np.argsort(raw[1:], kind="stable")


def eval_batches(tokens, batch_size, seq_len, limit=None):
    """Yields (inputs, targets) of windows side by side from the first token on, at most `limit` batches.

    Shapes (B,T) int32; the last batch may have fewer rows, and a last window shorter than T is left out.
    MinisbError if there are fewer than T + 1 tokens.
    """
    _check_shape(tokens, batch_size, seq_len)
    starts = np.arange(0, len(tokens) - seq_len, seq_len, dtype=np.int64)[:, None]
    if limit is not None:
        starts = starts[: limit * batch_size]
    return (_windows(tokens, starts[i : i + batch_size], seq_len) for i in range(0, len(starts), batch_size))


def _windows(tokens, starts, seq_len):
    """(B,1) starts -> inputs, targets (B,T) int32; a window that runs over the end goes on at token 0."""
    rows = tokens.take(starts + np.arange(seq_len + 1), mode="wrap").astype(np.int32)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def _check_shape(tokens, batch_size, seq_len):
    if batch_size < 1 or seq_len < 1:
        raise MinisbError(f"batch size and sequence length must be 1 or more, not {batch_size} and {seq_len}")
    if len(tokens) <= seq_len:
        raise MinisbError(
            f"the text has {len(tokens)} tokens, too few for a sequence length of {seq_len}: "
            "use more text or a smaller --seq-len"
        )


# --- the baseline that any model must beat


def bigram_loss(train, val, vocab):
    """Mean cross entropy in nats per token of a count-based bigram model on `val` (all but its first token).

    p(w | v) = (max(c(v,w) - d, 0) + d * followers(v) * p(w)) / c(v,.), and p(w) alone after a v
    that training never saw; p(w) = (max(c(w) - d, 0) + d * kinds / vocab) / c(.). d = 0.75: what
    the discount takes from seen pairs goes to unigrams, and from seen tokens to all tokens alike,
    so both sum to one and nothing is infinite.
    train, val: 1-D ids below `vocab`. MinisbError if train is empty or val has fewer than 2 tokens.
    """
    if len(train) < 1 or len(val) < 2:
        raise MinisbError("the bigram baseline needs a training token and two validation tokens")
    seen = np.bincount(train, minlength=vocab)
    unigram = (np.maximum(seen - DISCOUNT, 0) + DISCOUNT * np.count_nonzero(seen) / vocab) / len(train)

    pairs, pair_counts = np.unique(_pair_keys(train, vocab), return_counts=True)  # sparse: vocab**2 would not fit
    followers = np.bincount(pairs // vocab, minlength=vocab)
    context = np.bincount(train[:-1], minlength=vocab)

    left, right = np.asarray(val[:-1]), np.asarray(val[1:])
    keys = _pair_keys(val, vocab)
    found = np.searchsorted(pairs, keys).clip(max=max(len(pairs) - 1, 0))
    count = np.where(pairs[found] == keys, pair_counts[found], 0) if len(pairs) else np.zeros(len(keys))
    probability = np.maximum(count - DISCOUNT, 0) + DISCOUNT * followers[left] * unigram[right]
    probability = np.where(context[left] > 0, probability / np.maximum(context[left], 1), unigram[right])
    return float(-np.log(probability).mean())


def _pair_keys(tokens, vocab):
    """(N,) ids -> (N-1,) one int64 a neighbouring pair, left * vocab + right."""
    return tokens[:-1].astype(np.int64) * vocab + tokens[1:]
