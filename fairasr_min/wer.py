"""Word errors: counted per utterance first, divided last. No torch here.

The number printed while training and the one in the report come from these functions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jiwer


class Errors(NamedTuple):
    """Errors of one utterance or, added up, of many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0  # of the reference
    utterances: int = 0

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
    words = len(reference.split())
    if words == 0:
        return Errors(insertions=len(hypothesis.split()), utterances=1)
    out = jiwer.process_words(reference, hypothesis)
    return Errors(out.substitutions, out.deletions, out.insertions, words, 1)


def add(errors: Sequence[Errors]) -> Errors:
    return Errors(*map(sum, zip(*errors))) if errors else Errors()


def by_group(errors: Sequence[Errors], labels: Sequence[str | None]) -> dict[str | None, Errors]:
    """Summed errors of each label, sorted, the unlabelled (None) last."""
    groups: dict[str | None, list[Errors]] = {}
    for one, label in zip(errors, labels, strict=True):
        groups.setdefault(label, []).append(one)
    return {k: add(groups[k]) for k in sorted(groups, key=lambda k: (k is None, k or ""))}


class Disparity(NamedTuple):
    """How far apart the labelled groups are; WERs as fractions."""

    worst: str
    best: str
    gap: float  # worst WER - best WER
    ratio: float | None  # worst WER / best WER; None if the best group has no error


def disparity(groups: dict[str | None, Errors]) -> Disparity | None:
    """Gap between the groups that have a label and words; None with fewer than two of them."""
    rates = {label: e.wer for label, e in groups.items() if label is not None and e.words}
    if len(rates) < 2:
        return None
    worst, best = max(rates, key=rates.get), min(rates, key=rates.get)
    ratio = rates[worst] / rates[best] if rates[best] else None
    return Disparity(worst, best, rates[worst] - rates[best], ratio)
