"""The HTML report: every number there, nothing from the data that is not text, legible structure."""

import copy
import re
from html.parser import HTMLParser

import pytest

from fairasr_min.report_html import LONG, MANY_PAIRS, MANY_WORDS, to_html

# ---- reports to show -----------------------------------------------------------------------------


def estimate(value, width=0.02):
    return {"value": value, "interval": [value - width, value + width]}


NOTHING = {"value": None, "interval": None}


def measures(wer=0.1234, words=1000, speakers=40, **others):
    """Made so that S, D and I are 50, 30 and 20 % of the errors."""
    errors = round(wer * words)
    s, d = errors // 2, 3 * errors // 10
    return {
        "utterances": words // 8,
        "speakers": speakers,
        "words": words,
        "substitutions": s,
        "deletions": d,
        "insertions": errors - s - d,
        "wer": wer,
        "interval": [0.8 * wer, 1.25 * wer],
        "characters": 5 * words,
        "character_errors": 2 * errors,
        "cer": 0.4 * wer,
        "wrong_utterances": words // 20,
        "utterance_error_rate": 0.4,
        "speaker_macro_wer": 1.1 * wer,
    } | others


def column(rates, **others):
    """A part of `by` from {label: WER}; the last label is left out, the first has few speakers."""
    labels = list(rates)
    groups = {
        label: {**measures(wer), "compared": True, "few_clusters": False}
        for label, wer in rates.items()
    }
    groups[labels[0]]["few_clusters"] = True
    groups[labels[-1]]["compared"] = len(labels) == 1
    compared = {label: rates[label] for label in labels if groups[label]["compared"]}
    worst, best = max(compared, key=compared.get), min(compared, key=compared.get)
    gap = compared[worst] - compared[best]
    null = {"observed": gap, "expected": 0.0211, "percentile_95": 0.0433, "p": 0.0123}
    one = len(compared) < 2
    pairs = [
        {
            "group": a,
            "other": b,
            "difference": estimate(rates[a] - rates[b]),
            "ratio": estimate(rates[a] / rates[b]),
            "p": 0.0234,
            "p_holm": 0.0345,
        }
        for i, a in enumerate(compared)
        for b in list(compared)[i + 1 :]
    ]
    return {
        "groups": groups,
        "macro": estimate(sum(compared.values()) / len(compared)),
        "worst": None if one else worst,
        "best": None if one else best,
        "gap": NOTHING if one else estimate(gap),
        "ratio": NOTHING if one else estimate(rates[worst] / rates[best], 0.2),
        "relative_gap": None if one else gap / rates[best],
        "deviation": NOTHING if one else estimate(gap / 2),
        "no_difference": None if one else {"p": 0.0357, "gap": null, "deviation": null},
        "reference": None,
        "pairs": pairs,
        "adjusted": None,
        "examples": {
            labels[0]: [{"id": "a/1.wav", "errors": 3, "words": 5, "alignment": ALIGNMENT}]
        },
    } | others


ALIGNMENT = [
    ["equal", "turn the", "turn the"],
    ["substitute", "light", "night"],
    ["delete", "off", ""],
    ["equal", "please", "please"],
    ["insert", "", "now"],
]
ADJUSTED = {
    "reference": "female",
    "for": ["duration"],
    "groups": {"male": {"ratio": 1.37, "interval": [1.11, 1.69], "p": 0.0031}},
    "covariates": {"duration": {"ratio": 0.97, "interval": [0.91, 1.03], "p": 0.31}},
    "p": 0.0029,
    "utterances": 999,
    "left_out": 17,
}
CROSSED = {
    "female + adult": 0.0911,
    "female + child": 0.1722,
    "male + adult": 0.1133,
    "male + child": 0.2244,
}
ABOUT = {
    "manifest": "data/x/test.jsonl",
    "model": "finetune/model.pt",
    "synthetic": False,
    "normalization": "basic-1",
    "cluster": "speaker",
    "draws": 10_000,
    "seed": 0,
    "min_speakers": 10,
    "min_utterances": 1,
    "reference": None,
    "empty_references": 2,
    "commit": "abc1234",
    "command": "evaluate.py --by gender gender+age",
    "date": "2026-11-20",
    "bins": ["age=0", "18", "66"],
}
PROBE = {
    "majority": 0.55,
    "chance": 0.5,
    "speakers": 88,
    "groups": {"female": 500, "male": 600},
    "linear": estimate(0.8111),
    "nonlinear": estimate(0.8222),
    "random_init_linear": estimate(0.6333),
    "random_init_nonlinear": estimate(0.6444),
}


def compared(part):
    """Two systems by the groups of one column."""
    return {
        "groups": {label: estimate(0.0171 + 0.01 * i) for i, label in enumerate(part["groups"])},
        "gap_a": estimate(0.0777),
        "gap_b": estimate(0.0555),
        "gap_change": estimate(0.0222, 0.01),
        "pairs": [
            {key: pair[key] for key in ("group", "other", "difference", "p", "p_holm")}
            for pair in part["pairs"]
        ],
    }


def make_report(**others):
    by = {
        "gender": column(
            {"female": 0.1012, "male": 0.1516, "(missing)": 0.2023}, adjusted=ADJUSTED
        ),
        "gender+age": column(CROSSED),
    }
    comparison = {
        "a": "finetune/model.pt",
        "b": "other.jsonl",
        "utterances": 801,
        "only_in_a": 7,
        "only_in_b": 5,
        "overall": estimate(0.0199, 0.003),
        "mapsswe": {"mean": 0.1717, "statistic": 2.58, "p": 0.0099},
        "by": {name: compared(part) for name, part in by.items()},
    }
    return {
        "schema": 1,
        "name": "finetune/model.pt",
        "about": dict(ABOUT),
        "warnings": ["few speakers: 12 of gender=male"],
        "overall": measures(0.1357),
        "by": by,
        "others": [
            {"name": "other.jsonl", "overall": measures(0.1159), "by": copy.deepcopy(by)}
        ],
        "comparisons": [comparison],
        "leakage": {"model": "pretrained.pt", "n": 1100, "columns": {"gender": PROBE}},
    } | others
