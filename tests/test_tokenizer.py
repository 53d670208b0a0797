"""The tokenizer: what it learns, that it loses nothing, and that tiktoken and the slow encoder agree."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisb.corpus import load_corpus
from minisb.data import PACKAGED, default_tokenizer
from minisb.errors import MinisbError
from minisb.tokenizer import PATTERN, Tokenizer, bpe_encode, main, train_bpe

ROOT = Path(__file__).resolve().parent.parent
BYTES = [bytes([value]) for value in range(256)]

# Where Unicode classes, case rules and combining marks tend to differ between two regex engines.
AWKWARD = (
    "naïve Straße ΟΔΥΣΣΕΥΣ İstanbul ½²³① Ⅷ e\u0301 \u0915\u094d\u0937 क्षि 한국어 日本語、中文：字符。 עברית العربية "
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 “quoted” — … \u00a0\u2003\u2028\u200b\u200d\ufeff \x00\x1c\x1f\x85\x7f "
    "𝒳𐍈𠜎 ١٢٣ ߁ ª º _a__b_ __init__ 12345 "
    "\r\n\t\t x\v\f  \n\n    def f(self, *a):\n\treturn a<|endoftext|>"
)
texts = st.text() | st.text(alphabet=st.sampled_from(AWKWARD)) | st.text(alphabet="ab_ \n1.(")


@pytest.fixture(scope="module")
def packaged():
    return Tokenizer.load(PACKAGED)


def one_line(error):
    text = str(error.value)
    return text and "\n" not in text


# --- splitting


def tiktoken_split(text):
    """Ranks for bytes only would hide the borders, so every chunk is asked for as a token of its own."""
    ranks = {raw: rank for rank, raw in enumerate(dict.fromkeys([*BYTES, *_chunks(text)]))}
    encoding = tiktoken.Encoding("split", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]


def _chunks(text):
    return [chunk.encode() for chunk in re.findall(PATTERN, text)]


@settings(deadline=None)
@given(texts)
@example(AWKWARD)
def test_python_and_rust_split_alike(text):
    assert tiktoken_split(text) == _chunks(text)
    assert b"".join(_chunks(text)) == text.encode()


def test_python_and_rust_split_the_library_alike():
    documents = load_corpus("stdlib").val
    text = "\n".join(text for _, text in documents)
    assert tiktoken_split(text) == _chunks(text)


def test_split_keeps_code_together():
    assert re.findall(PATTERN, "def f(self, x_1):\n    return 'ab' + 12345\n\n\ny") == (
        ["def", " f", "(self", ",", " x", "_", "1", "):", "\n    ", "return", " '", "ab", "'", " +"]
        + [" 123", "45", "\n\n\n", "y"]
    )


def test_a_long_run_does_not_break_the_splitter(packaged):
    for run in (" ", "\n", "a", "中", "="):
        text = run * 300_000
        assert packaged.decode(packaged.encode_ordinary(text)) == text


# --- learning


def test_highest_count_first_then_longer_tokens():
    assert train_bpe(["abc\nabc\nab"], 300)[256:] == [b"ab", b"abc"]


def test_ties_go_to_the_lower_left_id_then_the_lower_right_id():
    # b"ca", b"ba" and b"bd" occur twice each, each in a chunk of its own
    assert train_bpe(["ca\nbd\nba\nca\nbd\nba"], 260)[256:] == [b"ba", b"bd", b"ca"]


def test_ties_of_learnt_tokens_follow_ids_not_bytes():
    # "zz" (id 256) counts most; later "zzb" (256, b) ties with "ab" (a, b): 97 < 256 although "ab" is no shorter
    assert train_bpe(["zz\nzz\nzz\nzzb\nzzb\nab\nab"], 260)[256:] == [b"zz", b"ab", b"zzb"]


def test_overlapping_pairs_merge_from_the_left():
    # aa aa a, twice: then (aa, a) and (aa, aa) tie, and the right id decides
    assert train_bpe(["aaaaa\naaaaa"], 259)[256:] == [b"aa", b"aaa"]


def test_a_pair_whose_count_fell_still_gets_its_turn():
    # bc counts 5 and ab 6; merging ab leaves bc 2, fewer than (ab, c) with 3
    assert train_bpe(["abc\n" * 3 + "ab\n" * 3 + "bc\n" * 2], 300)[256:] == [b"ab", b"abc", b"bc"]


def slow_train(text, ranks):
    """Counts everything anew before each merge: the definition, with nothing kept up to date."""
    words = [[bytes([b]) for b in chunk] for chunk in _chunks(text)]
    tokens = list(BYTES)
    while len(tokens) < ranks:
        counts = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda p: (-counts[p], tokens.index(p[0]), tokens.index(p[1])), default=None)
        if best is None or counts[best] < 2:
            break
        tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return tokens


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc_ \n", min_size=5, max_size=200), st.integers(257, 300))
@example("aaaaaaa aaaa aaa\naaaaaaa", 280)
def test_incremental_counts_give_what_full_counts_give(text, vocab):
    tokens = train_bpe([text], vocab)
    assert tokens == slow_train(text, vocab - 1)
    assert len(set(tokens)) == len(tokens)


def test_learning_does_not_depend_on_the_hash_seed():
    program = (
        "import hashlib, minisb.tokenizer as t;"
        "text = open(t.__file__, encoding='utf-8').read();"
        "print(hashlib.sha256(repr(t.train_bpe([text], 700)).encode()).hexdigest())"
    )

    def digest(seed):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout

    assert digest("1") == digest("2") != b""


def test_learning_stops_when_no_pair_occurs_twice():
    assert train_bpe(["abab"], 4096)[256:] == [b"ab"]
    assert train_bpe([""], 4096) == BYTES


def test_vocabulary_without_room_for_bytes():
    with pytest.raises(MinisbError) as error:
        train_bpe(["abc"], 256)
    assert one_line(error)


# --- encoding


@settings(deadline=None)
@given(texts)
@example(AWKWARD)
@example("")
def test_round_trip(packaged, text):
    assert packaged.decode(packaged.encode_ordinary(text)) == text
    assert packaged.decode(packaged.encode(text)) == text
    assert "".join(packaged.stream(packaged.encode_ordinary(text))) == text


@settings(deadline=None)
@given(texts)
@example(AWKWARD)
def test_slow_encoder_gives_the_same_ids(packaged, text):
    assert bpe_encode(text, packaged.ranks) == packaged.encode_ordinary(text)


def test_slow_encoder_gives_the_same_ids_on_code(packaged):
    for _, text in load_corpus("stdlib").val[:6]:
        assert bpe_encode(text, packaged.ranks) == packaged.encode_ordinary(text)


def test_special_token_only_where_asked_for(packaged):
    assert packaged.encode("a<|endoftext|>")[-1] == packaged.eot == packaged.vocab_size - 1
    assert packaged.eot not in packaged.encode_ordinary("a<|endoftext|>")
    assert packaged.decode_bytes([packaged.eot]) == b"<|endoftext|>"


def test_lone_surrogates_do_not_crash(packaged):
    assert packaged.decode(packaged.encode_ordinary("a\ud800b")) == "a\ufffdb"


def test_stream_never_yields_half_a_character():
    tokenizer = Tokenizer(BYTES)
    assert list(tokenizer.stream("é中🙂".encode())) == ["é", "中", "🙂"]
    assert list(tokenizer.stream("中".encode()[:2])) == ["\ufffd"]


def test_stream_is_lazy():
    def ids():
        yield from b"ab"
        raise RuntimeError("asked for more than needed")

    pieces = Tokenizer(BYTES).stream(ids())
    assert [next(pieces), next(pieces)] == ["a", "b"]


@pytest.mark.parametrize("bad", [-1, 4096, 10**12])
def test_id_outside_the_vocabulary(packaged, bad):
    with pytest.raises(MinisbError) as error:
        packaged.decode([bad])
    assert one_line(error)


# --- files


def test_packaged_tokenizer(packaged):
    assert packaged.vocab_size == 4096
    assert packaged.tokens[:256] == BYTES
    assert PACKAGED.stat().st_size < 100_000
    head = PACKAGED.read_text().splitlines()[:2]
    assert head[0].startswith("# Python 3.")
    assert head[1] == "# python -m minisb.tokenizer --data stdlib --vocab 4096 --out minisb/assets/stdlib-4096.tiktoken"
    assert default_tokenizer("stdlib", 4096).digest == packaged.digest


def test_save_and_load(tmp_path, packaged):
    path = tmp_path / "run" / "tokenizer.tiktoken"
    packaged.save(path, comment="two\nlines")
    again = Tokenizer.load(path, packaged.settings)
    assert (again.tokens, again.digest) == (packaged.tokens, packaged.digest)
    assert os.listdir(path.parent) == [path.name]


def test_tiktoken_reads_the_saved_file(tmp_path, packaged):
    from tiktoken.load import load_tiktoken_bpe

    packaged.save(tmp_path / "t.tiktoken")
    assert load_tiktoken_bpe(str(tmp_path / "t.tiktoken")) == packaged.ranks


def test_windows_newlines_in_the_file(tmp_path, packaged):
    packaged.save(tmp_path / "t", comment="c")
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(tmp_path / "t").digest == packaged.digest


def test_digest_tells_tokenizers_apart():
    assert Tokenizer([*BYTES, b"ab"]).digest != Tokenizer([*BYTES, b"ac"]).digest
    assert Tokenizer([*BYTES, b"ab", b"c d"]).digest != Tokenizer([*BYTES, b"abc", b" d"]).digest


def damage(lines):
    """Name -> lines of a file with one thing wrong."""
    return {
        "empty": [],
        "cut short": lines[:100],
        "half a line": [*lines[:-1], "YWI"],
        "not base64": ["A?A== 0", *lines[1:]],
        "not a rank": [*lines, "YWI= x"],
        "a gap in the ranks": [*lines[:10], *lines[11:]],
        "a token twice": [*lines, "AA== 256"],
        "an empty token": [*lines, " 256"],
        "not ASCII": [*lines, "é 256"],
    }


@pytest.mark.parametrize("what", damage([]))
def test_damaged_file(tmp_path, what):
    path = tmp_path / "t.tiktoken"
    Tokenizer(BYTES).save(path)
    path.write_text("\n".join(damage(path.read_text().splitlines())[what]), encoding="utf-8")
    with pytest.raises(MinisbError) as error:
        Tokenizer.load(path)
    assert one_line(error) and "t.tiktoken" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(MinisbError) as error:
            Tokenizer.load(path)
        assert one_line(error)


@pytest.mark.parametrize("name", ["format", "pattern", "special_tokens", "vocab_size", "digest"])
def test_file_of_another_run(tmp_path, name):
    tokenizer = Tokenizer(BYTES)
    tokenizer.save(tmp_path / "t")
    with pytest.raises(MinisbError) as error:
        Tokenizer.load(tmp_path / "t", tokenizer.settings | {name: "another"})
    assert one_line(error) and name in str(error.value)


def test_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one two one two " * 50)
    arguments = ["--data", str(tmp_path / "text.txt"), "--vocab", "260", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert Tokenizer.load(tmp_path / "out").vocab_size == 260
    capsys.readouterr()
    assert main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
