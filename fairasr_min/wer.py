"""Word and character errors: counted per utterance first, divided last. No torch here.

The number printed while training and the one in the report come from these functions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jiwer
from rapidfuzz.distance import Levenshtein


class Errors(NamedTuple):
    """Errors of one utterance or, added up, of many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference
    utterances: int = 0
    wrong_utterances: int = 0  # those with an error
    characters: int = 0  # of the reference, spaces between words included
    character_errors: int = 0

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float | None:
        """Errors a reference word, as a fraction; can exceed 1. None if there is no word."""
        return self.total / self.words if self.words else None


def count_errors(reference: str, hypothesis: str) -> Errors:
    """Errors of one utterance, both texts normalised already; words are split at spaces.

    An empty reference counts every hypothesised word as an insertion and adds no word.
    """
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    in_characters = (
        int(reference != hypothesis),
        len(reference),
        Levenshtein.distance(reference, hypothesis),
    )
    if not reference:
        return Errors(0, 0, len(hypothesis.split()), 0, 1, *in_characters)
    out = jiwer.process_words(reference, hypothesis)
    words = len(reference.split())
    return Errors(out.substitutions, out.deletions, out.insertions, words, 1, *in_characters)


def align(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """What became of the words of one utterance: ("equal", "substitute", "delete" or "insert",
    reference words, hypothesised words), one after another."""
    if not reference.split():
        return [("insert", "", " ".join(hypothesis.split()))] if hypothesis.split() else []
    out = jiwer.process_words(reference, hypothesis)
    ref, hyp = out.references[0], out.hypotheses[0]
    return [
        (
            c.type,
            " ".join(ref[c.ref_start_idx : c.ref_end_idx]),
            " ".join(hyp[c.hyp_start_idx : c.hyp_end_idx]),
        )
        for c in out.alignments[0]
    ]


def add(errors: Sequence[Errors]) -> Errors:
    return Errors(*map(sum, zip(*errors))) if errors else Errors()


def by_group(errors: Sequence[Errors], labels: Sequence[str | None]) -> dict[str | None, Errors]:
    """Summed errors of each label, sorted, the unlabelled (None) last."""
    groups: dict[str | None, list[Errors]] = {}
    for one, label in zip(errors, labels, strict=True):
        groups.setdefault(label, []).append(one)
    return {k: add(groups[k]) for k in sorted(groups, key=lambda k: (k is None, k or ""))}
