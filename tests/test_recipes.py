"""Transcribing with another recogniser, here a stand-in for the package pocketsphinx."""

import json

import pytest
from conftest import run

STAND_IN = """
class Decoder:
    def __init__(self, **settings): pass
    def reinit_feat(self): pass
    def start_utt(self): pass
    def end_utt(self): pass
    def process_raw(self, pcm, full_utt): self.samples = len(pcm) // 2
    def hyp(self):  # the longer half is words, the shorter nothing
        hypothesis = type("Hypothesis", (), {"hypstr": f"{self.samples} samples"})
        return hypothesis if self.samples > 25_000 else None
"""


@pytest.fixture
def package(tmp_path):
    """A folder for PYTHONPATH."""
    (tmp_path / "pocketsphinx.py").write_text(STAND_IN)
    info = tmp_path / "pocketsphinx-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pocketsphinx\nVersion: 0\n")
    return str(tmp_path)


def transcribe(demo, out, package, jobs=1, **more):
    return run(
        "recipes/pocketsphinx_transcribe.py", demo / "test.jsonl", "--out", out,
        "--jobs", jobs, PYTHONPATH=package, **more,
    )  # fmt: skip


def test_rows_keep_their_order_and_columns_and_an_interrupted_run_goes_on(demo, tmp_path, package):
    hyps = tmp_path / "hyps.jsonl"
    assert "40 utterances" in transcribe(demo, hyps, package, jobs=2)
    whole = hyps.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    texts = [row.pop("pred_text") for row in rows]
    manifest = (demo / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert rows == [json.loads(line) for line in manifest]
    for row, text in zip(rows, texts):
        samples = round(row["duration"] * 16_000)
        if samples > 26_000:  # durations are rounded
            assert abs(int(text.split()[0]) - samples) <= 160
        elif samples < 24_000:
            assert text == ""
    printed = run("evaluate.py", "--predictions", hyps, "--by", "gender", "--out", tmp_path / "e")
    assert "group_a" in printed

    hyps.unlink()
    unfinished = tmp_path / "hyps.jsonl.unfinished"
    unfinished.write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    left = 40 - whole[: len(whole) // 2].count(b"\n")
    assert f"{left} utterances" in transcribe(demo, hyps, package)
    assert hyps.read_bytes() == whole
    assert not unfinished.exists()


def test_mistakes_are_one_line(demo, tmp_path, package):
    hyps = tmp_path / "hyps.jsonl"
    assert "pip install pocketsphinx" in transcribe(demo, hyps, "", code=2)
    for content in ('{"pred_text": "of another"}\n', "[]\n"):
        (tmp_path / "hyps.jsonl.unfinished").write_text(content)
        said = transcribe(demo, hyps, package, code=2)
        assert "is of another manifest" in said and said.count("\n") == 1
    hyps.write_text("a result")
    assert "is there already" in transcribe(demo, hyps, package, code=2)
    assert hyps.read_text() == "a result"
