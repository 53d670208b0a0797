"""Byte-level BPE: how it is learnt, how it encodes, and how tiktoken does the same at speed.

Text is cut into chunks by PATTERN; inside a chunk, bytes are merged pair by pair, and a token's
rank says both its id and how early its merge happens. train_bpe learns the ranks, bpe_encode is
the whole encoder in a dozen readable lines, Tokenizer runs the same ranks through tiktoken.
"""

import argparse
import base64
import codecs
import hashlib
import heapq
import platform
import re
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import tiktoken
from tqdm import tqdm

from minisb.cache import atomic_write
from minisb.corpus import load_corpus
from minisb.errors import MinisbError

FORMAT = 1  # raise it when PATTERN, the special tokens or the file's layout change their meaning
SPECIAL_TOKENS = ("<|endoftext|>",)  # ids follow the ranks
BYTES = 256

# Every class is spelled out as ranges, never \w, \d or \s: Python's re and tiktoken's Rust regex
# disagree about those beyond ASCII, and each follows the Unicode version that it was built with.
# There is no lookahead either, so Rust splits in linear time, however long a run of spaces is.
_SPACE = r" \t\n\r\f\v"
# ASCII, the alphabets of U+00C0 to U+1FFF, Chinese, Japanese and Korean. All else counts as a sign.
_LETTER = r"A-Za-z\u00c0-\u1fff\u2c00-\u2dff\u3040-\ud7ff\uf900-\ufdff\U00020000-\U0003ffff"
PATTERN = "|".join(
    (
        rf"[^\t\n\r\f\v_0-9{_LETTER}]?_*[{_LETTER}]+",  # one part of an identifier, with a space or sign before it
        r" ?[0-9]{1,3}",
        rf" ?[^{_SPACE}0-9{_LETTER}]+",  # operators, brackets, emoji
        rf"[{_SPACE}]+",  # newlines and the next line's indentation stay together
    )
)


# --- learning the ranks


def train_bpe(texts, vocab_size, pattern=PATTERN):
    """Learns tokens from an iterable of str -> list of bytes, in rank order.

    `vocab_size` counts the special tokens too, so at most vocab_size - 1 ranks come back: the 256
    bytes, then one token a merge, always of the pair with the highest count (ties: lower left id,
    then lower right id). Fewer come back when no pair is left that occurs twice.
    MinisbError if vocab_size has no room for the bytes and the special tokens.
    """
    wanted = vocab_size - len(SPECIAL_TOKENS)
    if wanted < BYTES:
        raise MinisbError(f"a vocabulary needs at least {BYTES + len(SPECIAL_TOKENS)} tokens, not {vocab_size}")
    words = _Words(_count_chunks(texts, pattern))
    tokens = [bytes([value]) for value in range(BYTES)]
    with tqdm(total=wanted, initial=BYTES, desc="learn tokens", unit="token", disable=None) as bar:
        while len(tokens) < wanted and (pair := words.best_pair()):
            words.merge(pair, merged=len(tokens))
            # never bytes that are a token already: merges inside a token do not see what stands around it
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            bar.update()
    return tokens


def _count_chunks(texts, pattern):
    """-> Counter of chunks as bytes. Words repeat, so learning on distinct ones is 30 times less work."""
    find_chunks = re.compile(pattern).findall
    counts = Counter()
    for text in texts:
        counts.update(find_chunks(text))
    return {chunk.encode("utf-8", "replace"): count for chunk, count in counts.items()}


class _Words:
    """Distinct chunks as lists of ids, with the count of each adjacent pair kept up to date.

    `where` lists the words that hold a pair, or once held it, some twice: merge looks before it counts.
    The heap is lazy: an entry whose count has fallen since is put back with its true count.
    Nothing here iterates over a set, so the result does not depend on PYTHONHASHSEED.
    """

    def __init__(self, chunk_counts):
        self.words = [list(chunk) for chunk in chunk_counts]
        self.counts = list(chunk_counts.values())
        self.pairs = defaultdict(int)
        self.where = defaultdict(list)
        for index, (word, count) in enumerate(zip(self.words, self.counts, strict=True)):
            for pair in pairwise(word):
                self.pairs[pair] += count
                self.where[pair].append(index)
        self.heap = [(-count, *pair) for pair, count in self.pairs.items()]
        heapq.heapify(self.heap)

    def best_pair(self):
        """The pair to merge next, or None when no pair occurs twice."""
        while self.heap:
            negative, left, right = heapq.heappop(self.heap)
            count = self.pairs.get((left, right), 0)
            if count == -negative and count > 1:
                return left, right
            if 1 < count < -negative:
                heapq.heappush(self.heap, (-count, left, right))
        return None

    def merge(self, pair, merged):
        """Replaces `pair` by the id `merged` in every word that holds it, from left to right."""
        change = defaultdict(int)
        for index in self.where.pop(pair):
            old = self.words[index]
            new = _replace_pair(old, pair, merged)
            if len(new) == len(old):
                continue
            self.words[index] = new
            count = self.counts[index]
            for before in pairwise(old):
                change[before] -= count
            for after in pairwise(new):
                change[after] += count
                if merged in after:
                    self.where[after].append(index)
        for changed, by in change.items():
            self.pairs[changed] += by
            if by > 0:
                heapq.heappush(self.heap, (-self.pairs[changed], *changed))
        del self.pairs[pair]


def _replace_pair(ids, pair, merged):
    left, right = pair
    out = []
    i = 0
    while i < len(ids):
        if ids[i] == left and i + 1 < len(ids) and ids[i + 1] == right:
            out.append(merged)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


# --- encoding, slowly


def bpe_encode(text, ranks):
    """The whole encoder: text and {bytes: rank} -> list of ids. Tokenizer gives the same ids, faster."""
    ids = []
    for chunk in re.findall(PATTERN, text):
        raw = chunk.encode()
        parts = [raw] if raw in ranks else [bytes([value]) for value in raw]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            first = pairs.index(min(pairs))  # the lowest rank, and of equals the leftmost
            if pairs[first] == len(ranks):
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        ids += [ranks[part] for part in parts]
    return ids


# --- encoding, fast


class Tokenizer:
    """Ranks, PATTERN and the special tokens, run by tiktoken. Text in, ids out, and back."""

    def __init__(self, tokens):
        """`tokens`: list of bytes in rank order, as from train_bpe. MinisbError if bytes are missing or repeated."""
        self.tokens = list(tokens)
        self.ranks = {token: rank for rank, token in enumerate(self.tokens)}
        if len(self.ranks) != len(self.tokens):
            raise MinisbError("the tokenizer holds the same token twice")
        if any(bytes([value]) not in self.ranks for value in range(BYTES)):
            raise MinisbError("the tokenizer lacks some of the 256 single bytes")
        self.special_tokens = {name: len(self.tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "minisb", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @property
    def vocab_size(self):
        """Ranks and special tokens together: rows that an embedding needs."""
        return len(self.tokens) + len(self.special_tokens)

    @property
    def eot(self):
        """Id of <|endoftext|>, which ends every document."""
        return self.special_tokens["<|endoftext|>"]

    @property
    def settings(self):
        """What the file of ranks does not say, for a run's config.json; `load` holds a file to it."""
        return {
            "format": FORMAT,
            "pattern": PATTERN,
            "special_tokens": list(SPECIAL_TOKENS),
            "vocab_size": self.vocab_size,
            "digest": self.digest,
        }

    @property
    def digest(self):
        """32 hex digits; two tokenizers with the same digest give the same ids for any text."""
        digest = hashlib.blake2b(repr((FORMAT, PATTERN, SPECIAL_TOKENS)).encode(), digest_size=16)
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text):
        """str -> list of ids, where "<|endoftext|>" in the text becomes the special token: for prompts."""
        return self._encoding.encode(text, allowed_special="all")

    def encode_ordinary(self, text):
        """str -> list of ids, where "<|endoftext|>" is plain text like any other: for training data."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        """Ids (any iterable of integers) -> bytes. MinisbError for an id outside the vocabulary."""
        return b"".join(map(self._token_bytes, ids))

    def decode(self, ids):
        """Ids -> str; bytes that are not UTF-8, such as half a character at the end, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, ids):
        """Ids, as they arrive -> str pieces to print; a character is held back until its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if text := decoder.decode(self._token_bytes(i)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _token_bytes(self, i):
        i = int(i)
        if 0 <= i < len(self.tokens):
            return self.tokens[i]
        if 0 <= i < self.vocab_size:
            return SPECIAL_TOKENS[i - len(self.tokens)].encode()
        raise MinisbError(f"token id {i} is outside the vocabulary of {self.vocab_size}")

    def save(self, path, comment=""):
        """Writes tiktoken's format, a line a rank: base64 of the token, space, rank. `#` before comment lines."""
        lines = [f"# {line}" for line in comment.splitlines()]
        lines += [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(self.tokens)]
        with atomic_write(path) as temporary:
            temporary.write_bytes("\n".join([*lines, ""]).encode())

    @classmethod
    def load(cls, path, settings=None):
        """Reads what `save` or tiktoken wrote. `settings` (of a run's config.json) must fit, if given.

        MinisbError if the file is missing, damaged or belongs to other settings.
        """
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            raise MinisbError(f"there is no tokenizer at {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise MinisbError(f"cannot read the tokenizer {path}: it is no file of text") from error
        try:
            tokenizer = cls(_parse_ranks(lines))
        except MinisbError as error:
            raise MinisbError(f"the tokenizer {path} is damaged: {error}") from error
        if settings is not None:
            tokenizer._check_settings(path, settings)
        return tokenizer

    def _check_settings(self, path, settings):
        for name, mine in self.settings.items():
            if name in settings and settings[name] != mine:
                raise MinisbError(f"the tokenizer {path} does not belong to this run or version: its {name} differs")


def _parse_ranks(lines):
    """Lines of tiktoken's format after any `#` lines -> list of bytes. MinisbError names the bad line."""
    tokens = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") and not tokens:
            continue
        try:
            token, rank = line.split(" ")
            token = base64.b64decode(token, validate=True)
            good = int(rank) == len(tokens) and token
        except ValueError:  # also base64's binascii.Error
            good = False
        if not good:
            raise MinisbError(f"line {number} is not a token and the next rank")
        tokens.append(token)
    return tokens


# --- the command that makes a file of ranks


def main(arguments=None):
    """python -m minisb.tokenizer: learn tokens from a corpus and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m minisb.tokenizer", description=main.__doc__)
    parser.add_argument("--data", default="stdlib", help="stdlib, shakespeare, tinystories, or a file or folder")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in all, the special one included")
    parser.add_argument("--out", required=True, help="file to write, in tiktoken's format")
    options = parser.parse_args(arguments)
    try:
        corpus = load_corpus(options.data)
        tokenizer = Tokenizer(train_bpe((text for _, text in corpus.train), options.vocab))
        command = f"python -m minisb.tokenizer --data {options.data} --vocab {options.vocab} --out {options.out}"
        tokenizer.save(options.out, f"Python {platform.python_version()}, {platform.system()}\n{command}")
    except MinisbError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{tokenizer.vocab_size} tokens from {corpus.train_bytes} bytes, digest {tokenizer.digest}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
