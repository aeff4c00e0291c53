"""The report: its numbers against hand counts, and its text against hostile names."""

import json
import re

import pytest

from fairasr_min.report import MISSING, make_report, to_markdown, to_text
from fairasr_min.wer import count_errors

ABOUT = {"manifest": "data/x/test.jsonl", "model": "runs/finetune/model.pt", "commit": "abc123"}
SPOKEN = [  # reference, hypothesis, gender, region
    ("one two three four", "one two three four", "female", "north"),
    ("one two", "one too", "female", "south"),
    ("one two three", "one three", "male", "north"),
    ("one", "one two three", "male", "south"),
    ("one two", "", None, "south"),
    ("", "noise", "male", None),
]


def errors():
    return [count_errors(reference, hypothesis) for reference, hypothesis, _, _ in SPOKEN]


def report(**about):
    gender, region = [s[2] for s in SPOKEN], [s[3] for s in SPOKEN]
    crossed = [f"{g} + {r}" if g and r else None for g, r in zip(gender, region)]
    groups = {"gender": gender, "region": region, "gender+region": crossed}
    return make_report(errors(), groups, ABOUT | about)


def counts(s, d, i, words, utterances):
    names = ("substitutions", "deletions", "insertions", "words", "utterances")
    rate = (s + d + i) / words if words else None
    return dict(zip(names, (s, d, i, words, utterances))) | {"wer": rate}


def test_numbers_are_the_hand_counts():
    r = report()
    assert r["overall"] == counts(1, 3, 3, 12, 6)
    assert r["by"]["gender"]["groups"] == {
        "female": counts(1, 0, 0, 6, 2),
        "male": counts(0, 1, 3, 4, 3),
        MISSING: counts(0, 2, 0, 2, 1),
    }
    assert r["by"]["region"]["groups"] == {
        "north": counts(0, 1, 0, 7, 2),
        "south": counts(1, 2, 2, 5, 3),
        MISSING: counts(0, 0, 1, 0, 1),
    }
    assert r["by"]["gender+region"]["groups"] == {
        "female + north": counts(0, 0, 0, 4, 1),
        "female + south": counts(1, 0, 0, 2, 1),
        "male + north": counts(0, 1, 0, 3, 1),
        "male + south": counts(0, 0, 2, 1, 1),
        MISSING: counts(0, 2, 1, 2, 2),
    }
    assert r["about"] == ABOUT


def test_the_missing_are_shown_but_make_no_gap():
    part = report()["by"]["gender"]
    assert part["groups"][MISSING]["wer"] == 1.0  # as bad as the worst
    gap = part["disparity"]
    assert (gap["worst"], gap["best"]) == ("male", "female")
    assert gap["gap"] == pytest.approx(4 / 4 - 1 / 6) and gap["ratio"] == pytest.approx(6)
    for text in (to_text(report()), to_markdown(report())):
        assert MISSING in text
        assert "gap to the best (female) 83.33 points, ratio 6.00" in text


def test_the_report_is_plain_json():
    r = report(synthetic=True, bad_rows_left_out=0)
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def cells(text, name):
    """The numbers in the row that begins with name, of the terminal's table."""
    (row,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return row[len(name) :].split()


def test_terminal_tables():
    r = report()
    text = to_text({**r, "by": {"gender": r["by"]["gender"]}})
    assert cells(text, "all") == ["58.33", "6", "12", "1", "3", "3"]
    assert cells(text, "female") == ["16.67", "2", "6", "1", "0", "0"]
    assert cells(text, "male") == ["100.00", "3", "4", "0", "1", "3"]
    assert cells(text, MISSING) == ["100.00", "1", "2", "0", "2", "0"]
    table = [line for line in text.splitlines() if re.match(r"gender |all |female|male|\(", line)]
    assert len(table) == 5 and len({len(line) for line in table}) == 1  # aligned
    assert cells(to_text({**r, "by": {"region": r["by"]["region"]}}), MISSING)[0] == "n/a"


def markdown_table(text, heading):
    """The cells of the table under a heading, as a Markdown reader splits them."""
    lines = text.split(f"\n## {heading}\n", 1)[1].strip().splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        inside = line.strip().removeprefix("|").removesuffix("|")
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", inside)])
    return rows


def test_markdown_tables():
    rows = markdown_table(to_markdown(report()), "gender+region")
    assert rows[0] == ["gender+region", "WER %", "utterances", "words", "S", "D", "I"]
    assert rows[2] == ["all", "58.33", "6", "12", "1", "3", "3"]
    assert rows[3] == ["female + north", "0.00", "1", "4", "0", "0", "0"]
    assert rows[-1] == [MISSING, "150.00", "2", "2", "0", "2", "1"]
    assert "- commit: abc123" in to_markdown(report())


def test_no_columns_is_one_line():
    r = make_report(errors(), {}, ABOUT)
    assert r["by"] == {}
    assert cells(to_text(r), "all")[0] == "58.33"
    assert markdown_table(to_markdown(r), "all")[-1][:2] == ["all", "58.33"]


def test_no_words_is_not_available():
    silent = [count_errors("", "a"), count_errors("", "")]
    r = make_report(silent, {"gender": ["female", "male"]}, ABOUT)
    assert r["overall"]["wer"] is None and r["by"]["gender"]["disparity"] is None
    for text in (to_text(r), to_markdown(r)):
        assert text.count("n/a") == 3 and "nan" not in text.replace("n/a", "")
        assert "fewer than two groups" in text


def test_a_perfect_group_has_a_gap_and_no_ratio():
    perfect = [count_errors("a b", "a b"), count_errors("a b", "a")]
    text = to_text(make_report(perfect, {"gender": ["female", "male"]}, ABOUT))
    assert "gap to the best (female) 50.00 points, ratio n/a" in text


@pytest.mark.parametrize("name", ["a|b", "a||b", "\\|", "x\\", "<script>alert(1)</script>", "a\nb"])
@pytest.mark.parametrize("place", ["label", "column", "manifest", "about"])
def test_hostile_names_break_no_markdown(name, place):
    label, column = (name if place == p else p for p in ("label", "column"))
    about = ABOUT | ({"manifest": name} if place == "manifest" else {})
    about |= {name: name} if place == "about" else {}
    text = to_markdown(make_report(errors()[:2], {column: [label, "other"]}, about))
    assert "<" not in text
    assert not any(line.startswith("b") for line in text.splitlines())  # no row ends early
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    for row in rows:
        bars = [m for m in re.finditer(r"\\*\|", row) if len(m[0]) % 2]  # not escaped
        assert len(bars) == 8, row


@pytest.mark.parametrize("line_end", ["\r", "\r\n"])
def test_a_line_end_in_a_name_ends_no_row(line_end):
    text = to_markdown(make_report(errors()[:2], {"column": [f"a{line_end}b", "c"]}, ABOUT))
    assert "\r" not in text and len([x for x in text.splitlines() if x.startswith("|")]) == 5


def test_a_group_named_like_the_missing_keeps_its_errors():
    r = make_report(errors()[:3], {"gender": [MISSING, None, "male"]}, ABOUT)
    shown = r["by"]["gender"]["groups"].values()
    assert sum(c["utterances"] for c in shown) == 3


@pytest.mark.parametrize("to", [to_text, to_markdown])
def test_synthetic_speech_is_called_so(to):
    assert "SYNTHETIC" in to(report(synthetic=True)) and "nothing about people" in to(
        report(synthetic=True)
    )
    assert "SYNTHETIC" not in to(report(synthetic=False))
    assert "SYNTHETIC" not in to(report())
    for fact in (ABOUT["manifest"], ABOUT["model"]):
        assert fact in to(report())
