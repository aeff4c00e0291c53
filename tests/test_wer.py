"""Word errors against a Levenshtein table of our own, and the arithmetic of groups."""

import random

import pytest

from fairasr_min.wer import Errors, add, align, by_group, count_errors


def levenshtein(a, b):
    """Fewest substitutions, deletions and insertions that turn the list a into b."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (a[i - 1] != b[j - 1]),
            )
    return table[-1][-1]


WORDS = ["a", "b", "ab", "it's", "\u00e9t\u00e9", "\u4f60\u597d", "\u0645\u0631\u062d\u0628\u0627"]
WORDS += ["\u0928\u092e\u0938\u094d\u0924\u0947", "0", "'n'", "\U00010330"]


@pytest.mark.parametrize("vocabulary", [1, 2, 4, len(WORDS)])
def test_errors_are_the_edit_distance(vocabulary):
    rng = random.Random(vocabulary)
    for _ in range(300):
        a = rng.choices(WORDS[:vocabulary], k=rng.randint(0, 9))
        b = rng.choices(WORDS[:vocabulary], k=rng.randint(0, 9))
        e = count_errors(" ".join(a), " ".join(b))
        assert e.total == e.substitutions + e.deletions + e.insertions == levenshtein(a, b)
        assert len(b) == e.words - e.deletions + e.insertions
        assert min(e) >= 0 and e.substitutions + e.deletions <= e.words == len(a)
        assert e.utterances == 1
        assert e.wer == (e.total / len(a) if a else None)


def test_errors_near_the_reference():
    """Long texts with few errors, as recognisers make them."""
    rng = random.Random(0)
    for _ in range(20):
        a = rng.choices(WORDS, k=60)
        b = [w for w in a if rng.random() > 0.1]
        b = [rng.choice(WORDS) if rng.random() < 0.1 else w for w in b]
        assert count_errors(" ".join(a), " ".join(b)).total == levenshtein(a, b)


TABLE = [
    ("a b c", "a b c", Errors(0, 0, 0, 3, 1)),
    ("a b c", "a x c", Errors(1, 0, 0, 3, 1)),
    ("a b c", "a c", Errors(0, 1, 0, 3, 1)),
    ("a b c", "a b x c", Errors(0, 0, 1, 3, 1)),
    ("a b c", "", Errors(0, 3, 0, 3, 1)),
    ("", "a b", Errors(0, 0, 2, 0, 1)),
    ("", "", Errors(0, 0, 0, 0, 1)),
    ("a", "b c d", Errors(1, 0, 2, 1, 1)),
    ("ab", "a b", Errors(1, 0, 1, 1, 1)),  # words, not characters
]


@pytest.mark.parametrize("reference, hypothesis, expected", TABLE)
def test_counts(reference, hypothesis, expected):
    assert count_errors(reference, hypothesis)[:5] == expected[:5]


def test_wer_can_exceed_1_and_needs_words():
    assert count_errors("a", "b c d").wer == 3.0
    assert count_errors("", "a").wer is None
    assert Errors().wer is None and Errors().total == 0


def test_add_sums_counts_and_not_rates():
    short, long = count_errors("a", "b"), count_errors(" ".join("abcdefghi"), " ".join("abcdefghi"))
    assert add([short, long])[:5] == (1, 0, 0, 10, 2)
    assert add([short, long]).wer == 0.1  # the mean of the rates would be 0.5
    assert add([]) == Errors()
    assert add([short]) == short
    assert add([count_errors("", "a b"), long]).wer == 2 / 9  # its insertions count all the same


def random_errors(n, seed=0):
    rng = random.Random(seed)
    return [Errors(*(rng.randint(0, 5) for _ in range(4)), 1) for _ in range(n)]


def test_groups_sum_to_the_whole():
    errors = random_errors(50)
    labels = random.Random(1).choices(["b", "a", None, "c"], k=50)
    groups = by_group(errors, labels)
    assert list(groups) == ["a", "b", "c", None]  # sorted, the unlabelled last
    for label, summed in groups.items():
        for field in range(5):
            mine = (e[field] for e, its_label in zip(errors, labels) if its_label == label)
            assert summed[field] == sum(mine)
    assert add(list(groups.values())) == add(errors)


def test_groups_need_a_label_for_each_utterance():
    assert by_group([], []) == {}
    with pytest.raises(ValueError):
        by_group(random_errors(3), ["a", "b"])


def test_character_errors_are_the_edit_distance_of_the_texts():
    rng = random.Random(0)
    for _ in range(100):
        a, b = (" ".join(rng.choices(WORDS, k=rng.randint(0, 6))) for _ in range(2))
        e = count_errors(a, b)
        assert (e.characters, e.character_errors) == (len(a), levenshtein(a, b))
        assert e.wrong_utterances == (a != b)


def test_alignment_holds_every_word_and_counts_as_the_errors_do():
    rng = random.Random(0)
    for _ in range(200):
        a, b = (" ".join(rng.choices(WORDS[:5], k=rng.randint(0, 8))) for _ in range(2))
        steps, e = align(a, b), count_errors(a, b)
        assert " ".join(ref for _, ref, _ in steps if ref) == a
        assert " ".join(hyp for _, _, hyp in steps if hyp) == b
        sizes = dict.fromkeys(("equal", "substitute", "delete", "insert"), 0)
        for kind, ref, hyp in steps:
            sizes[kind] += len((ref or hyp).split())
            assert (ref == hyp) == (kind == "equal")
        assert sizes["substitute"] == e.substitutions and sizes["delete"] == e.deletions
        assert sizes["insert"] == e.insertions


def test_a_text_of_a_megabyte():
    text = "word " * 200_000
    e = count_errors(text, text + "more")
    assert (e.words, e.total, e.character_errors) == (200_000, 1, 5)
