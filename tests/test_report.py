"""The report: its numbers against jiwer and hand counts, and its text against hostile names."""

import csv
import io
import json
import random
import re

import jiwer
import pytest

from fairasr_min import stats
from fairasr_min.report import MISSING, make_report, to_csv, to_markdown, to_text

ABOUT = {"manifest": "data/x/test.jsonl", "model": "runs/finetune/model.pt", "commit": "abc123"}
SPOKEN = [  # reference, hypothesis, gender, region, speaker
    ("one two three four", "one two three four", "female", "north", "s1"),
    ("one two", "one too", "female", "south", "s1"),
    ("one two three", "one three", "male", "north", "s2"),
    ("one", "one two three", "male", "south", "s3"),
    ("one two", "", None, "south", "s4"),
    ("", "noise", "male", None, "s3"),
]
FEW = dict(draws=200)


def report(rows=SPOKEN, about=None, **options):
    references, hypotheses, gender, region, speakers = map(list, zip(*rows))
    crossed = [f"{g} + {r}" if g and r else None for g, r in zip(gender, region)]
    groups = {"gender": gender, "region": region, "gender+region": crossed}
    options = {"clusters": speakers, **FEW, **options}
    return make_report(references, {"ours": hypotheses}, groups, ABOUT | (about or {}), **options)


def counts(part):
    names = ("substitutions", "deletions", "insertions", "words", "utterances", "speakers")
    return tuple(part[name] for name in names)


def test_numbers_are_the_hand_counts():
    r = report()
    assert counts(r["overall"]) == (1, 3, 3, 12, 6, 4) and r["overall"]["wer"] == 7 / 12
    assert {k: counts(v) for k, v in r["by"]["gender"]["groups"].items()} == {
        "female": (1, 0, 0, 6, 2, 1),
        "male": (0, 1, 3, 4, 3, 2),
        MISSING: (0, 2, 0, 2, 1, 1),
    }
    assert {k: counts(v) for k, v in r["by"]["region"]["groups"].items()} == {
        "north": (0, 1, 0, 7, 2, 2),
        "south": (1, 2, 2, 5, 3, 3),
        MISSING: (0, 0, 1, 0, 1, 1),
    }
    assert list(r["by"]["gender+region"]["groups"]) == [
        "female + north", "female + south", "male + north", "male + south", MISSING,
    ]  # fmt: skip
    male = r["by"]["gender"]["groups"]["male"]
    assert male["wer"] == 4 / 4 and male["utterance_error_rate"] == 1.0
    assert male["speaker_macro_wer"] == pytest.approx((1 / 3 + 3 / 1) / 2)
    assert r["by"]["region"]["groups"][MISSING]["wer"] is None  # insertions, and no words
    assert r["about"] == ABOUT and r["schema"] == 1 and r["name"] == "ours"


WORDS = [
    "a",
    "ab",
    "it's",
    "\u00e9t\u00e9",
    "\u4f60\u597d",
    "\u0645\u0631",
    "\u05e9",
    "0",
    "x" * 300,
]


def random_rows(n, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        reference = rng.choices(WORDS, k=rng.choice([0, 1, 1, 5, 20, 200 if i % 50 == 0 else 9]))
        hypothesis = [rng.choice(WORDS) if rng.random() < 0.3 else w for w in reference]
        hypothesis = [w for w in hypothesis if rng.random() > 0.1] + rng.choices(WORDS, k=i % 3)
        speaker = rng.randrange(40)
        gender, region = ["female", "male", None][speaker % 3], ["north", "south"][speaker % 2]
        rows.append((" ".join(reference), " ".join(hypothesis), gender, region, f"s{speaker}"))
    return rows


def test_rates_are_those_of_jiwer():
    rows = random_rows(400)
    r = report(rows)
    for column, place in (("gender", 2), ("region", 3)):
        for label, group in r["by"][column]["groups"].items():
            part = [row for row in rows if (row[place] or MISSING) == label]
            spoken = [row for row in part if row[0]]  # jiwer takes no empty reference
            inserted = sum(len(row[1].split()) for row in part if not row[0])
            out = jiwer.process_words([row[0] for row in spoken], [row[1] for row in spoken])
            words = sum(len(row[0].split()) for row in spoken)
            errors = out.substitutions + out.deletions + out.insertions + inserted
            assert group["words"] == words and group["wer"] == errors / words
            letters = jiwer.process_characters([s[0] for s in spoken], [s[1] for s in spoken])
            wrong = letters.substitutions + letters.deletions + letters.insertions
            wrong += sum(len(row[1]) for row in part if not row[0])
            assert group["cer"] == pytest.approx(wrong / sum(len(row[0]) for row in spoken))
            assert group["utterance_error_rate"] == sum(s[0] != s[1] for s in part) / len(part)


def test_disparity_agrees_with_the_groups_and_lies_in_its_interval():
    part = report(random_rows(400))["by"]["gender"]
    rates = {label: g["wer"] for label, g in part["groups"].items() if label != MISSING}
    assert rates[part["worst"]] == max(rates.values()) and rates[part["best"]] == min(
        rates.values()
    )
    gap = max(rates.values()) - min(rates.values())
    assert part["gap"]["value"] == pytest.approx(gap)
    assert part["ratio"]["value"] == pytest.approx(max(rates.values()) / min(rates.values()))
    assert part["relative_gap"] == pytest.approx(gap / min(rates.values()))
    assert part["no_difference"]["gap"]["observed"] == pytest.approx(gap)
    for one in (part["gap"], part["ratio"], part["macro"], *part["groups"].values()):
        value = one.get("value", one.get("wer"))
        assert one["interval"][0] <= value <= one["interval"][1]


def test_the_missing_are_shown_but_make_no_gap():
    part = report()["by"]["gender"]
    assert part["groups"][MISSING]["wer"] == 1.0 and not part["groups"][MISSING]["compared"]
    assert (part["worst"], part["best"]) == ("male", "female")
    assert part["gap"]["value"] == pytest.approx(4 / 4 - 1 / 6)
    for text in (to_text(report()), to_markdown(report())):
        assert MISSING in text and "worst male, best female: gap 83.33 points" in text


def test_small_groups_are_shown_but_make_no_gap():
    rows = random_rows(300) + [("one", "two", "other", "north", "s99")]
    r = report(rows, min_speakers=2)
    part = r["by"]["gender"]
    assert not part["groups"]["other"]["compared"] and part["groups"]["other"]["wer"] == 1.0
    assert "other" not in (part["worst"], part["best"])
    assert all("other" not in (p["group"], p["other"]) for p in part["pairs"])
    assert any("too small: other" in w for w in r["warnings"]) and "other *" in to_text(r)
    assert any("fewer than 10 speakers in other" in w for w in r["warnings"])
    part = report(rows, min_utterances=2)["by"]["gender"]
    assert not part["groups"]["other"]["compared"]
    assert report(rows)["by"]["gender"]["worst"] == "other"


def test_a_reference_group():
    part = report(random_rows(300), reference="north")["by"]["region"]
    assert [(p["group"], p["other"]) for p in part["pairs"]] == [("south", "north")]
    assert report(random_rows(300), reference="north")["by"]["gender"]["reference"] is None
    with pytest.raises(stats.StatisticsError, match="'east'"):
        report(reference="east")


def test_labels_that_vary_within_a_speaker_refuse_the_permutation_test():
    rows = [(*row[:2], ["calm", "angry"][i % 2], *row[3:]) for i, row in enumerate(random_rows(99))]
    part = report(rows)["by"]["gender"]
    assert "varies within" in part["no_difference"]["refused"] and part["gap"]["interval"]
    assert "varies within" in to_text(report(rows))


def test_without_speakers_every_utterance_stands_alone():
    r = report(clusters=None)
    assert r["overall"]["speakers"] is None and r["overall"]["speaker_macro_wer"] is None
    assert r["by"]["gender"]["groups"]["male"]["few_clusters"] is False


def test_the_worst_utterances_are_aligned():
    examples = report(ids=[f"{i}.wav" for i in range(6)])["by"]["gender"]["examples"]
    assert [e["id"] for e in examples["male"]] == ["3.wav", "2.wav", "5.wav"]
    assert examples["male"][0]["alignment"] == [
        ["equal", "one", "one"],
        ["insert", "", "two three"],
    ]
    assert examples["male"][1]["alignment"] == [
        ["equal", "one", "one"], ["delete", "two", ""], ["equal", "three", "three"],
    ]  # fmt: skip
    assert examples["male"][2]["alignment"] == [["insert", "", "noise"]]
    assert MISSING not in examples and list(examples) == ["female", "male"]


def two_systems(**options):
    rows = random_rows(300)
    references, worse, gender, _, speakers = map(list, zip(*rows))
    rng = random.Random(1)
    better = [r if rng.random() < 0.5 else h for r, h in zip(references, worse)]
    return references, worse, better, gender, speakers


def test_two_systems():
    references, worse, better, gender, speakers = two_systems()
    r = make_report(references, {"A": worse, "B": better}, {"gender": gender}, ABOUT,
                    clusters=speakers, **FEW)  # fmt: skip
    (other,), (c,) = r["others"], r["comparisons"]
    assert (r["name"], other["name"], c["a"], c["b"]) == ("A", "B", "A", "B")
    change = r["overall"]["wer"] - other["overall"]["wer"]
    assert c["overall"]["value"] == pytest.approx(change) and change > 0.1
    assert c["overall"]["interval"][0] > 0 and c["mapsswe"]["p"] < 0.001
    part, gaps = c["by"]["gender"], [s["by"]["gender"]["gap"]["value"] for s in (r, other)]
    assert part["gap_change"]["value"] == pytest.approx(gaps[0] - gaps[1])
    assert (part["gap_a"]["value"], part["gap_b"]["value"]) == pytest.approx(tuple(gaps))
    for text in (to_text(r), to_markdown(r)):
        assert "A - B, points of WER (above 0: B errs less)" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(r))))
    assert [row["system"] for row in rows] == ["A"] * 4 + ["B"] * 4
    json.dumps(r, allow_nan=False)


def test_adjusting_needs_its_package_or_gives_ratios():
    rows = random_rows(400)
    part = report(rows, covariates={"length": [len(row[0]) for row in rows]})["by"]["gender"]
    adjusted = part["adjusted"]
    if "refused" in adjusted:
        assert "pip install statsmodels" in adjusted["refused"]
    else:
        assert list(adjusted["groups"]) == ["male"] and adjusted["for"] == ["length"]
        assert "with length held fixed, male against female" in to_text(
            report(rows, covariates={"length": [len(row[0]) for row in rows]})
        )


def test_the_same_seed_gives_the_same_report():
    assert report(random_rows(99)) == report(random_rows(99))
    assert report(random_rows(99)) != report(random_rows(99), seed=1)


@pytest.mark.parametrize("rows", [
    [("", "", "a", "x", "s1")],
    [("", "noise", "a", "x", "s1"), ("", "", "b", "x", "s2")],
    [("one", "one", "a", "x", "s1")] * 3,
    [("one", "", "a", "x", f"s{i}") for i in range(4)],
    [("one", "a b c d e f", ["a", "b"][i % 2], "x", f"s{i}") for i in range(4)],
    [("one two", "one", None, None, "s1")],
])  # fmt: skip
def test_degenerate_data_gives_a_report_too(rows):
    r = report(rows)
    json.dumps(r, allow_nan=False)
    for text in (to_text(r), to_markdown(r), to_csv(r)):
        assert "nan" not in text.lower().replace("nana", "")


def test_nothing_to_count():
    with pytest.raises(stats.StatisticsError, match="no utterance"):
        make_report([], {"ours": []}, {}, ABOUT)


def test_the_report_is_plain_json():
    r = report(about={"synthetic": True, "bad_rows_left_out": 0})
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def cells(text, name):
    """The numbers in the row that begins with name, of the terminal's table."""
    (row,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return row[len(name) :].replace(" to ", "-").split()


def test_terminal_tables():
    r = report()
    text = to_text({**r, "by": {"gender": r["by"]["gender"]}})
    assert cells(text, "all")[0] == "58.33" and cells(text, "all")[-6:] == [*"46", "12", *"133"]
    assert cells(text, "female")[0] == "16.67" and cells(text, "female")[-5:] == [*"26100"]
    assert cells(text, MISSING)[0] == "100.00" and cells(text, MISSING)[-5:] == [*"12020"]
    table = [line for line in text.splitlines() if re.match(r"gender |all |female|male |\(", line)]
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
    header = ["gender+region", "WER %", "95 %", "speakers", "utterances", "words", "S", "D", "I"]
    assert rows[0] == header and all(len(row) == len(header) for row in rows)
    assert rows[2][:2] == ["all", "58.33"] and rows[3][:2] == ["female + north", "0.00"]
    assert rows[-1][0] == MISSING and rows[-1][3:] == ["2", "2", "2", "0", "2", "1"]
    assert "- commit: abc123" in to_markdown(report())


def test_no_columns_is_one_line():
    r = make_report(["one"], {"ours": ["two"]}, {}, ABOUT, **FEW)
    assert r["by"] == {} and cells(to_text(r), "all")[0] == "100.00"


def made(rows, groups, about=ABOUT):
    references, hypotheses = map(list, zip(*rows))
    return make_report(references, {"ours": hypotheses}, groups, about, **FEW)


def test_no_words_is_not_available():
    r = made([("", "a"), ("", "")], {"gender": ["female", "male"]})
    assert r["overall"]["wer"] is None and r["by"]["gender"]["worst"] is None
    for text in (to_text(r), to_markdown(r)):
        assert "n/a" in text and "nan" not in text.replace("n/a", "")
        assert "fewer than two groups" in text


def test_a_perfect_group_has_a_gap_and_no_ratio():
    text = to_text(made([("a b", "a b"), ("a b", "a")], {"gender": ["female", "male"]}))
    assert "worst male, best female: gap 50.00 points (95 %: n/a), ratio n/a" in text


@pytest.mark.parametrize("name", ["a|b", "a||b", "\\|", "x\\", "<script>alert(1)</script>", "a\nb"])
@pytest.mark.parametrize("place", ["label", "column", "manifest", "about", "system"])
def test_hostile_names_break_no_markdown(name, place):
    label, column = (name if place == p else p for p in ("label", "column"))
    about = ABOUT | ({"manifest": name} if place == "manifest" else {})
    about |= {name: name} if place == "about" else {}
    systems = {name if place == "system" else "A": ["b", "b"], "B": ["a", "b"]}
    text = to_markdown(make_report(["a", "b"], systems, {column: [label, "other"]}, about, **FEW))
    assert "<" not in text
    assert not any(line.startswith("b") for line in text.splitlines())  # no row ends early
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 10  # two systems
    for row in rows:
        bars = [m for m in re.finditer(r"\\*\|", row) if len(m[0]) % 2]  # not escaped
        assert len(bars) == 10, row


@pytest.mark.parametrize("line_end", ["\r", "\r\n"])
def test_a_line_end_in_a_name_ends_no_row(line_end):
    text = to_markdown(made([("a", "b"), ("a", "a")], {"column": [f"a{line_end}b", "c"]}))
    assert "\r" not in text and len([x for x in text.splitlines() if x.startswith("|")]) == 5


def test_a_group_named_like_the_missing_keeps_its_errors():
    r = made([("a", "b")] * 3, {"gender": [MISSING, None, "male"]})
    shown = r["by"]["gender"]["groups"].values()
    assert sum(c["utterances"] for c in shown) == 3


@pytest.mark.parametrize("to", [to_text, to_markdown])
def test_synthetic_speech_is_called_so(to):
    marked = to(report(about={"synthetic": True}))
    assert "SYNTHETIC" in marked and "nothing about people" in marked
    assert "SYNTHETIC" not in to(report(about={"synthetic": False}))
    assert "SYNTHETIC" not in to(report())
    for fact in (ABOUT["manifest"], ABOUT["model"]):
        assert fact in to(report())


def test_the_ratio_does_not_depend_on_the_reference():
    rows = [(*row[:2], ["x", "y", "z"][int(row[4][1:]) % 3], *row[3:]) for row in random_rows(300)]
    ratios = [report(rows, reference=r)["by"]["gender"]["ratio"]["value"] for r in ("x", "y", "z")]
    assert ratios == pytest.approx([report(rows)["by"]["gender"]["ratio"]["value"]] * 3)


def test_a_reference_that_is_too_small_is_said():
    r = report(random_rows(300), reference="male", min_speakers=99)
    assert "gender: male is too small to refer to" in r["warnings"]


def test_groups_that_do_not_differ():
    r = report([("one two", "one two", g, "x", f"s{i}") for i, g in enumerate("abab")])
    assert r["by"]["gender"]["gap"]["value"] == 0
    assert "all groups have the same word error rate" in to_text(r)


@pytest.mark.parametrize("length", [-1e-7, float("inf")])
def test_covariates_that_make_no_sense_cost_no_report(length):
    pytest.importorskip("statsmodels")
    rows = random_rows(400)
    values = [length * len(row[0]) for row in rows]
    part = report(rows, covariates={"length": values})["by"]["gender"]
    assert "refused" in part["adjusted"]
