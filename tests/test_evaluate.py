"""Other systems' output, audited and compared: files of every kind, and files that lie."""

import csv
import json
import random
import re
import sys

import jiwer
import pytest

import evaluate
from fairasr_min import data, runtime
from fairasr_min.data import ManifestError
from fairasr_min.stats import StatisticsError
from fairasr_min.text import normalize

WORDS = "one two three four five six seven".split()


def spoken(n=120, wrong=0.3, seed=0):
    """Rows of 30 speakers in two groups."""
    rng, words = random.Random(seed), random.Random(7)
    rows = []
    for i in range(n):
        reference = words.choices(WORDS, k=words.randint(1, 9))
        heard = [rng.choice(WORDS) if rng.random() < wrong else w for w in reference]
        speaker = i % 30
        rows.append({
            "audio_filepath": f"{i}.wav", "text": " ".join(reference), "pred_text": " ".join(heard),
            "speaker": f"s{speaker}", "gender": ["female", "male"][speaker % 2],
            "age": 10 + 2 * speaker, "duration": 0.4 * len(reference),
        })  # fmt: skip
    return rows


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    """Run evaluate.py -> exit code, what it printed, and the report."""

    def run(*arguments):
        command = ["evaluate.py", *map(str, arguments), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, "--draws", "200"])
        with pytest.raises(SystemExit) as ended:
            runtime.run(evaluate.main, (ManifestError, StatisticsError))
        printed = capsys.readouterr()
        found = tmp_path / "out" / "report.json"
        report = json.loads(found.read_text()) if found.exists() else None
        return ended.value.code, printed.out + printed.err, report

    return run


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_one_file_of_predictions(tmp_path, audit, suffix):
    rows = spoken()
    file = write(tmp_path / f"p.{suffix}", rows)
    by = ("--by", "gender", "age", "--bins", "age=0,30")  # a table has only texts
    code, printed, report = audit("--predictions", file, *by)
    assert code == 0, printed
    assert set(report["by"]["age"]["groups"]) == {"0-29", "30+"}
    for label, group in report["by"]["gender"]["groups"].items():
        part = [r for r in rows if r["gender"] == label]
        assert group["wer"] == pytest.approx(
            jiwer.wer([r["text"] for r in part], [r["pred_text"] for r in part])
        )
        assert group["speakers"] == 15
    assert report["about"]["cluster"] == "speaker" and report["warnings"] == []
    for name in ("report.json", "report.md", "report.csv", "report.html"):
        assert str(tmp_path / "out" / name) in printed
    assert not (tmp_path / "out" / "hyps.jsonl").exists()


def test_numbers_are_cut_into_named_bins(tmp_path, audit):
    rows = spoken()
    rows[5]["age"], rows[6]["age"] = None, "old"
    file = write(tmp_path / "p.jsonl", rows)
    code, _, report = audit("--predictions", file, "--by", "age", "gender+age",
                            "--bins", "age=12,18,30.0,46")  # fmt: skip
    sizes = {k: g["utterances"] for k, g in report["by"]["age"]["groups"].items()}
    assert code == 0
    assert sizes == {
        "12-17": 12,
        "18-29": 22,
        "30-45": 32,
        "46+": 48,
        "under 12": 4,
        "(missing)": 2,
    }
    assert "female + 18-29" in report["by"]["gender+age"]["groups"]


@pytest.mark.parametrize("value, name", [
    (0, "0-17"), (17.9, "0-17"), ("18", "18-65"), (66, "66+"), (-1, "under 0"),
    (None, None), ("x", None), (float("nan"), None), ([1], None),
])  # fmt: skip
def test_bins(value, name):
    assert data.bin_of(value, [0, 18, 66]) == name
    assert data.bin_of(0.5, [0, 0.5, 1]) == "0.5 to 1"


BINS = ["age", "age=", "age=5,x", "age=5,5", "age=9,3", "age=nan,3", "age=0,inf", "age=2,2.0000001"]


@pytest.mark.parametrize("bins", BINS)
def test_bins_that_make_no_sense(tmp_path, audit, bins):
    file = write(tmp_path / "p.jsonl", spoken())
    code, printed, _ = audit("--predictions", file, "--bins", bins)
    assert code == 2 and "rising numbers" in printed


def test_bins_of_a_column_that_no_table_shows(tmp_path, audit):
    file = write(tmp_path / "p.jsonl", spoken())
    code, printed, _ = audit("--predictions", file, "--by", "gender", "--bins", "age=0,18")
    assert code == 2 and "--by does not name age" in printed
    code, _, report = audit("--predictions", file, "--by", "gender+age", "--bins", "age=0,18")
    assert code == 0 and report["by"]["gender+age"]["groups"]


def test_systems_are_joined_whatever_the_order_and_what_is_missing_is_listed(tmp_path, audit):
    a, b = spoken(), spoken(wrong=0.1, seed=1)
    random.Random(0).shuffle(b)
    b = [r for r in b if r["audio_filepath"] != "3.wav"]
    for r in b:
        del r["gender"], r["speaker"], r["text"]  # the first file has them
    a, b = write(tmp_path / "a.jsonl", a), write(tmp_path / "b.csv", b)
    code, printed, report = audit("--compare", a, b, "--by", "gender")
    assert code == 0, printed
    (c,) = report["comparisons"]
    assert c["utterances"] == report["overall"]["utterances"] == 119
    assert f"{b} lacks 1 utterances, left out for all systems: 3.wav" in printed
    assert c["overall"]["value"] > 0.1 and c["mapsswe"]["p"] < 0.01
    left = [r for r in spoken(wrong=0.1, seed=1) if r["audio_filepath"] != "3.wav"]
    expected = jiwer.wer([r["text"] for r in left], [r["pred_text"] for r in left])
    assert report["others"][0]["overall"]["wer"] == pytest.approx(expected)
    again = audit("--predictions", a, b, "--by", "gender")[2]
    assert again["comparisons"] == report["comparisons"]


def test_references_that_differ_and_parts_of_a_recording(tmp_path, audit):
    a, b = spoken(40), spoken(40, seed=1)
    for rows in (a, b):
        for i, r in enumerate(rows):
            r |= {"audio_filepath": "long.wav", "offset": float(i)}
    b[0]["text"] = "something else"
    a, b = write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)
    code, printed, report = audit("--compare", a, b)
    assert code == 0 and report["comparisons"][0]["utterances"] == 40
    assert f"{b}: 1 reference texts differ; those of {a} count" in printed


COMPARED = {
    "twice in one file": (lambda b: b + b[:1], [], "row 121: '0.wav' is there twice"),
    "no name": (lambda b: [{**r, "audio_filepath": None} for r in b], [], "row 1 has no audio_fil"),
    "nothing in common": (
        lambda b: [{**r, "audio_filepath": r["text"] + str(i)} for i, r in enumerate(b)],
        [], "no utterance",
    ),
    "no such column": (lambda b: b, ["--id", "uid"], "row 1 has no uid"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_files_that_cannot_be_joined(tmp_path, audit, name):
    change, options, reason = COMPARED[name]
    a = write(tmp_path / "a.jsonl", spoken())
    b = write(tmp_path / "b.jsonl", change(spoken(seed=1)))
    code, printed, report = audit("--compare", a, b, *options)
    assert code == 2 and re.search(reason, printed) and report is None, printed
    assert not (tmp_path / "out").exists()


def test_the_same_file_twice(tmp_path, audit):
    a = write(tmp_path / "a.jsonl", spoken())
    code, printed, _ = audit("--compare", a, a)
    assert code == 2 and "given twice" in printed


BAD_FILES = {
    "no text column": (b"ref,hyp\na,b\n", "csv", r"p.csv:2: missing 'text'; columns .*: ref, hyp"),
    "a short line": (b"text,pred_text\na\n", "csv", r"p.csv:2: more or fewer cells"),
    "an unquoted comma": (b"text,pred_text\na,b, c\n", "csv", r"p.csv:2: more or fewer cells"),
    "an open quote": (b'text,pred_text\na,b\n"a,b\nc,d\n', "csv", r"p.csv:4: more or fewer"),
    "a stray quote": (b'text,pred_text\na,"b\na,b\na",c\n', "csv", r"p.csv:4: more or fewer"),
    "a column twice": (
        b"text,pred_text,pred_text\na,b,c\n",
        "csv",
        "1: column 'pred_text' is there",
    ),
    "semicolons": (b"text;pred_text\na;b\n", "csv", r"p.csv:2: missing 'text'.*separated by"),
    "in capitals": (b"text;pred_text\na;b\n", "CSV", r"p.CSV:2: missing 'text'"),
    "half a pair": (b'{"text": "a", "pred_text": "\\ud83d"}', "jsonl", r"p.jsonl:1: not JSON"),
    "NaN": (b'{"text": "a", "pred_text": NaN}', "jsonl", r"p.jsonl:1: pred_text must be .* nan"),
    "a number": (b'{"text": 5, "pred_text": "a"}', "jsonl", r"p.jsonl:1: text must be a text"),
    "broken JSON": (b'{"text": "a", "pred_text": "a"}\n{"te', "jsonl", r"p.jsonl:2: not JSON"),
    "empty": (b"", "jsonl", "holds no rows"),
    "only a header": (b"text,pred_text\n", "csv", "holds no rows"),
    "Latin-1": ("text,pred_text\ncaf\u00e9,x\n".encode("latin-1"), "csv", "UTF-8 is expected"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "jsonl", "UTF-8 is expected"),
    "binary": (bytes(range(256)), "tsv", "UTF-8 is expected|cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_predictions_that_cannot_be_read(tmp_path, audit, name):
    content, suffix, reason = BAD_FILES[name]
    file = tmp_path / f"p.{suffix}"
    file.write_bytes(content)
    code, printed, report = audit("--predictions", file)
    assert code == 2 and re.search(reason, printed) and report is None, printed
    assert not (tmp_path / "out").exists()


def test_odd_files_that_simply_work(tmp_path, audit):
    long = "word " * 200_000
    content = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in [
        {"text": long, "pred_text": long + "more", "gender": "a"},
        {"text": "\u4f60\u597d \u05e9\u05dc\u05d5\u05dd", "pred_text": "", "gender": "b"},
        {"text": "", "pred_text": "noise", "gender": "b"},
    ])  # fmt: skip
    file = tmp_path / "p.jsonl"
    file.write_text(content, encoding="utf-8", newline="")
    code, printed, report = audit("--predictions", file, "--by", "gender")
    assert code == 0 and report["about"]["empty_references"] == 1
    groups = report["by"]["gender"]["groups"]
    assert groups["a"]["words"] == 200_000 and groups["a"]["insertions"] == 1
    assert (groups["b"]["words"], groups["b"]["deletions"], groups["b"]["insertions"]) == (2, 2, 1)
    assert any("no speaker is named" in w for w in report["warnings"])


def test_rows_that_repeat_are_counted_and_said(tmp_path, audit):
    rows = spoken()
    code, printed, report = audit("--predictions", write(tmp_path / "p.jsonl", rows + rows[:2]))
    assert code == 0 and report["overall"]["utterances"] == 122
    assert "2 rows repeat an utterance" in printed


def test_who_is_resampled(tmp_path, audit):
    rows = spoken()
    for r in rows[:7]:
        r["speaker"] = None
    file = write(tmp_path / "p.jsonl", rows)
    code, printed, report = audit("--predictions", file, "--by", "gender")
    assert code == 0 and "7 utterances without speaker: each counts as a speaker" in printed
    assert report["overall"]["speakers"] == 30 + 7
    report = audit("--predictions", file, "--cluster", "age")[2]
    assert report["about"]["cluster"] == "age" and report["overall"]["speakers"] == 30
    code, printed, _ = audit("--predictions", file, "--cluster", "who")
    assert code == 2 and "no column 'who'" in printed


def test_normalisation_is_as_asked_and_written_down(tmp_path, audit):
    rows = [
        {"text": "It's Ten, o'clock", "pred_text": "its ten o'clock", "gender": g} for g in "ab"
    ]
    file = write(tmp_path / "p.jsonl", rows)
    by_name = {
        name: audit("--predictions", file, "--normalize", name)[2] for name in ("none", "basic")
    }
    assert by_name["none"]["overall"]["substitutions"] == 4
    assert by_name["basic"]["overall"]["substitutions"] == 2
    assert by_name["none"]["about"]["normalization"] == "none"
    assert by_name["basic"]["about"]["normalization"] == "basic-1"
    assert normalize("It's Ten, o'clock") == "it's ten o'clock"
    code, printed, report = audit("--predictions", file, "--normalize", "whisper")
    if code:
        assert "pip install whisper-normalizer" in printed
    else:
        assert report["about"]["normalization"] == "whisper (English)"


def test_a_reference_that_is_no_group(tmp_path, audit):
    file = write(tmp_path / "p.jsonl", spoken())
    code, printed, _ = audit("--predictions", file, "--by", "gender", "--reference", "robot")
    assert code == 2 and "no column of --by has a group 'robot'" in printed
    report = audit("--predictions", file, "--by", "gender", "--reference", "male")[2]
    assert [p["other"] for p in report["by"]["gender"]["pairs"]] == ["male"]


def test_adjusting_takes_numbers_from_a_table_too(tmp_path, audit):
    pytest.importorskip("statsmodels")
    rows = spoken(400)
    for suffix in ("csv", "jsonl"):
        file = write(tmp_path / f"p.{suffix}", rows)
        report = audit("--predictions", file, "--by", "gender", "--adjust", "duration")[2]
        adjusted = report["by"]["gender"]["adjusted"]
        assert list(adjusted["groups"]) == ["male"] and list(adjusted["covariates"]) == ["duration"]


def test_a_column_without_numbers_has_no_bins(tmp_path, audit):
    rows = [{**r, "age": 10**400} for r in spoken()]
    file = write(tmp_path / "p.jsonl", rows)
    for column in ("gender", "age"):
        code, printed, _ = audit("--predictions", file, "--by", column, "--bins", f"{column}=1,2")
        assert code == 2 and f"no number in '{column}'" in printed


def test_arguments_that_say_nothing(tmp_path, audit):
    file = write(tmp_path / "p.jsonl", spoken())
    code, printed, _ = audit("--predictions", file, "--adjust", "duration")
    assert code == 2 and "--adjust needs --by" in printed
    code, printed, _ = audit("--compare", file)
    assert code == 2 and "--compare needs two files" in printed


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report.html"])
def test_an_input_is_not_overwritten(tmp_path, audit, name):
    (tmp_path / "out").mkdir()
    rows = write(tmp_path / "p.jsonl", spoken()).read_bytes()
    place = tmp_path / "out" / name
    if name.endswith("csv"):
        write(place, spoken())
    else:
        place.write_bytes(rows)
    before = place.read_bytes()
    code, printed, _ = audit("--predictions", place) if name != "report.html" else audit(
        "--compare", tmp_path / "p.jsonl", place
    )  # fmt: skip
    assert code == 2 and "would be overwritten" in printed and place.read_bytes() == before


def test_a_report_is_no_folder(tmp_path, audit):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    code, printed, _ = audit("--predictions", write(tmp_path / "p.jsonl", spoken()))
    assert code == 2 and "report.html is a folder" in printed
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_offsets_are_numbers_however_they_are_written(tmp_path, audit):
    a, b = spoken(40), spoken(40, seed=1)
    for i, (r, s) in enumerate(zip(a, b)):
        r |= {"audio_filepath": "long.wav", "offset": i}
        s |= {"audio_filepath": "long.wav", "offset": float(i)}
    a, b = write(tmp_path / "a.jsonl", a), write(tmp_path / "b.csv", b)
    report = audit("--compare", a, b)[2]
    assert report["comparisons"][0]["utterances"] == 40 and report["warnings"] == []


def test_names_do_not_command_the_terminal(tmp_path, audit):
    rows = [{**r, "gender": r["gender"] + "\x1b[31m\n# h"} for r in spoken()]
    code, printed, _ = audit("--predictions", write(tmp_path / "p.jsonl", rows), "--by", "gender")
    assert code == 0 and "\x1b" not in printed and "\n# h" not in printed
    assert "female?[31m?# h" in printed


def test_what_is_no_group(tmp_path, audit):
    file = write(tmp_path / "p.jsonl", spoken(240))
    code, printed, _ = audit("--predictions", file, "--by", "audio_filepath")
    assert code == 2 and "column 'audio_filepath' has 240 values; at most 200" in printed


def test_leakage_is_shown_beside(tmp_path, audit):
    file = write(tmp_path / "p.jsonl", spoken())
    code, printed, _ = audit("--predictions", file, "--leakage", tmp_path / "gone.json")
    assert code == 2 and "gone.json" in printed
    for content in ("{", "[]", "{}", '{"columns": {"gender": {}}}', '{"columns": [1]}'):
        (tmp_path / "broken.json").write_text(content)
        code, printed, _ = audit("--predictions", file, "--leakage", tmp_path / "broken.json")
        assert code == 2 and "broken.json: not written by" in printed, content
    score = {"value": 0.75, "interval": [0.7, 0.8]}
    probed = {"majority": 0.5, "chance": 0.5, "speakers": 30, "groups": {"female": 60, "male": 60}}
    probed |= dict.fromkeys(("linear", "nonlinear", "random_init_linear"), score)
    leakage = {"model": "m.pt", "n": 120, "columns": {"gender": probed}}
    (tmp_path / "leakage.json").write_text(json.dumps(leakage))
    arguments = ("--predictions", file, "--by", "gender", "--leakage", tmp_path / "leakage.json")
    code, printed, report = audit(*arguments)
    assert code == 0 and report["leakage"] == leakage
    gap = report["by"]["gender"]["gap"]["value"]
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.md", "report.html")]
    assert all("75.00" in text and f"{100 * gap:.2f}" in text for text in [printed, *pages])
    assert all("proxy" in text for text in [printed, *pages])
