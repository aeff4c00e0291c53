"""Text normalisation on hostile Unicode, tokenizer round trips, CTC's rules against brute force."""

import itertools
import random
import unicodedata

import pytest
import torch

from fairasr_min.text import Tokenizer, ctc_collapse, ctc_min_frames, normalize, train_tokenizer

# ---- normalisation -------------------------------------------------------------------------------

CASES = {
    "": "",
    "   \t\n ": "",
    "Hello, World!": "hello world",
    "  many\u00a0spaces\u3000here\n": "many spaces here",
    "HEY PLAY MUSIC": "hey play music",
    "don\u2019t don\u2018t don\u02bct don`t don\u00b4t don\uff07t": " ".join(["don't"] * 6),
    "\u201cquoted\u201d \u00abwords\u00bb": "quoted words",
    "co-op well\u2010known non\u2011stop 1990\u20131995 wait\u2014what": (
        "co op well known non stop 1990 1995 wait what"
    ),
    "caf\u00e9 cafe\u0301": "caf\u00e9 caf\u00e9",
    "\u1e69 s\u0323\u0307 s\u0307\u0323": "\u1e69 \u1e69 \u1e69",  # in any order
    "left\u200eto\u200fright": "lefttoright",
    "soft\u00adhyphen": "softhyphen",
    "\ufeffbom zero\u200bwidth": "bom zerowidth",
    "nice \U0001f600 day": "nice day",
    "good\U0001f44d\U0001f3fdjob": "good job",  # with a skin tone
    "the \U0001f468\u200d\U0001f469\u200d\U0001f467 family": "the family",
    "we \u2764\ufe0f you": "we you",  # a heart, and an invisible variation selector
    "\u845b\U000e0100\u57ce": "\u845b\u57ce",  # an ideographic one
    "a \u00a8 b \u00af c": "a b c",  # NFKC splits these symbols into a space and an accent
    "\u0645\u0631\u062d\u0628\u0627\u060c \u0643\u064a\u0641\u061f": (
        "\u0645\u0631\u062d\u0628\u0627 \u0643\u064a\u0641"
    ),
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\u0964": (
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e"
    ),
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002": "\u4f60\u597d \u4e16\u754c",
    "room 101, \u0664\u0662 \u0968": "room 101 \u0664\u0662 \u0968",  # digits of any script
    "\uff21\uff22\uff23 \ufb01ne \u2460": "abc fine 1",  # compatibility forms
    "STRASSE Stra\u00dfe": "strasse stra\u00dfe",
    "$5 & 10% = #1_a/b": "5 10 1 a b",
    "rock 'n' roll, dogs' o'clock": "rock 'n' roll dogs' o'clock",
    "' alone '' and ' again \u2019": "alone and again",
    "a\ud800b": "a b",  # half of a surrogate pair, which JSON can spell
}


@pytest.mark.parametrize("text", CASES)
def test_normalize(text):
    assert normalize(text) == CASES[text]


def test_composed_and_decomposed_text_are_equal():
    text = "\u00c5ngstr\u00f6m \u1ec7 \ud55c\uad6d\uc5b4 \u00f1 \u0439 \u0958"
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert len(set(forms)) > 1
    assert len({normalize(form) for form in forms}) == 1


def assigned_characters():
    planes = [range(0xD800), range(0xE000, 0x3FFFF), range(0xE0000, 0xE0200)]
    return [chr(c) for c in itertools.chain(*planes) if unicodedata.category(chr(c)) != "Cn"]


def test_every_character_is_kept_or_dropped_for_good():
    characters = assigned_characters()
    assert len(characters) > 100_000
    once = normalize(" ".join(f"a{c}b {c} {c}{c}" for c in characters))
    assert normalize(once) == once
    left = {unicodedata.category(c)[0] for c in set(once) - {" ", "'"}}
    assert left == {"L", "M", "N"}
    assert once == once.strip() and "  " not in once


def test_normalize_is_idempotent_on_random_text():
    rng = random.Random(0)
    nasty = "'\u2019`\u00b4\u200d\u200e\u00ad\u034f\ufe0f\u0301\u0323\u0327\u030a\u0345\u1100\u1161"
    nasty += "\u11a8\u0149\u03a3\u0130I\u00df\u1e9eaeo \t-.\u00a8\u037a\u0e33\u0958\u4e00\U0001f600"
    anything = assigned_characters()
    for _ in range(4000):
        pools = [rng.choice([nasty, nasty, anything]) for _ in range(rng.randint(1, 12))]
        text = "".join(map(rng.choice, pools))
        once = normalize(text)
        assert normalize(once) == once, ascii(text)
        for form in ("NFC", "NFD"):  # however it is stored
            assert normalize(unicodedata.normalize(form, once)) == once, ascii(text)


def test_accents_need_a_letter():
    """An accent on nothing is no word: it would count as one in every word error rate."""
    for text in ("\u0301", "a \u0301 b", "-\u0301", "\U0001f600\u0301", "'\u0301"):
        assert not any(unicodedata.category(w[0])[0] == "M" for w in normalize(text).split())
    assert normalize("\u0301") == ""


# ---- tokenizer -----------------------------------------------------------------------------------

SYLLABLES = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "ta", "'s", "\u00e9", "\u4f60"]


def sentences(n_words, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(n_words)]
    texts = [" ".join(words[i : i + 10]) for i in range(0, n_words, 10)]
    return [normalize(text) for text in texts]


@pytest.fixture(scope="module")
def small():
    return train_tokenizer(sentences(300), 64)


@pytest.fixture(scope="module")
def large():
    return train_tokenizer(sentences(6600), 64)


def test_little_text_gives_characters(small):
    tokenizer, why = small
    characters = set("".join(sentences(300)))
    assert len(tokenizer) == len(characters) + 1  # and the unknown
    assert all(len(tokenizer.encode(text)) == len(text) for text in sentences(300))
    assert str(len(tokenizer)) in why and "character" in why


def test_more_text_gives_longer_units(large):
    tokenizer, why = large
    assert 32 < len(tokenizer) <= 64
    texts = sentences(6600)
    assert sum(len(tokenizer.encode(t)) for t in texts) < 0.7 * sum(map(len, texts))
    assert str(len(tokenizer)) in why and "6,600 words" in why


@pytest.mark.parametrize("n_words, characters", [(6399, True), (6400, False)])
def test_the_border_is_100_words_a_unit(n_words, characters):
    texts = [normalize("ba dolu kimeno " * (n_words // 3) + "su " * (n_words % 3))]
    texts = [" ".join(texts[0].split()[i : i + 20]) for i in range(0, n_words, 20)]
    assert sum(len(text.split()) for text in texts) == n_words
    longest = max(
        len(piece.strip("\u2581")) for piece in train_tokenizer(texts, 64)[0].pieces()[1:]
    )
    assert (longest == 1) == characters


@pytest.mark.parametrize("which", ["small", "large"])
def test_round_trip(which, request):
    tokenizer, _ = request.getfixturevalue(which)
    n_words = 300 if which == "small" else 6600
    again = Tokenizer(bytes(tokenizer.model))  # through a model file
    assert len(again) == len(tokenizer) == len(tokenizer.pieces()) == len(set(tokenizer.pieces()))
    assert again.pieces() == tokenizer.pieces()
    for text in [*sentences(n_words), "", "ba"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer) for i in ids)
        assert again.encode(text) == ids and again.decode(ids) == text


@pytest.mark.parametrize("which", ["small", "large"])
def test_unknown_characters_are_shown_and_no_words(which, request):
    tokenizer, _ = request.getfixturevalue(which)
    ids = tokenizer.encode("baxdo \u0416 lu")
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.unknown in ids and "\u2047" in tokenizer.decode(ids)
    assert normalize(tokenizer.decode(ids)).split() == ["ba", "do", "lu"]
    assert normalize(tokenizer.decode(tokenizer.encode("\u0416"))) == tokenizer.decode([]) == ""


def test_units_are_the_same_every_time(small, large):
    assert train_tokenizer(sentences(300), 64)[0].model == small[0].model
    assert train_tokenizer(sentences(6600), 64)[0].model == large[0].model


@pytest.mark.parametrize("texts", [[], [""], ["", " "]])
def test_no_text_no_units(texts):
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(texts, 64)


def test_a_script_with_more_characters_than_units():
    rng = random.Random(0)
    syllables = [chr(0xAC00 + 7 * i) for i in range(200)]
    words = ["".join(rng.choices(syllables, k=2)) for _ in range(6600)]
    texts = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    tokenizer, _ = train_tokenizer(texts, 64)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


@pytest.mark.parametrize("others", [[], ["ab ba"]])
def test_a_long_transcript_counts(others):
    long = " ".join(["hello"] * 1500 + ["xyz"])  # ten minutes
    tokenizer, _ = train_tokenizer([*others, long], 64)
    assert tokenizer.decode(tokenizer.encode(long)) == long


# ---- CTC -----------------------------------------------------------------------------------------


def slow_collapse(ids, blank):
    out, last = [], blank
    for i in ids:
        if i != last and i != blank:
            out.append(i)
        last = i
    return out


def test_collapse_is_the_definition():
    assert ctc_collapse([], 3) == []
    assert ctc_collapse([3, 3], 3) == []
    assert ctc_collapse([0, 0, 3, 0, 1, 1, 3, 2], 3) == [0, 0, 1, 2]
    for path in itertools.product(range(3), repeat=7):
        assert ctc_collapse(list(path), 2) == slow_collapse(path, 2)
        assert ctc_collapse(list(path), 0) == slow_collapse(path, 0)


@pytest.mark.parametrize("n_frames", range(7))
def test_min_frames_is_the_shortest_path(n_frames):
    reached = {
        tuple(ctc_collapse(list(p), 2)) for p in itertools.product(range(3), repeat=n_frames)
    }
    for size in range(6):
        for target in itertools.product(range(2), repeat=size):
            assert (target in reached) == (ctc_min_frames(list(target)) <= n_frames)


@pytest.mark.parametrize(
    "target", [[], [0], [0, 1], [0, 0], [1, 1, 1], [0, 1, 1, 0, 2, 2], [2] * 5]
)
def test_ctc_loss_is_finite_from_min_frames_on(target):
    need, frames = ctc_min_frames(target), 12
    log_probs = torch.randn(frames, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for n in range(1, frames + 1):
        loss = torch.nn.functional.ctc_loss(
            log_probs[:n, None],
            torch.tensor([target], dtype=torch.long),
            torch.tensor([n]),
            torch.tensor([len(target)]),
            blank=3,
        )
        assert bool(loss.isfinite()) == (n >= need)
