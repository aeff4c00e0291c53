"""The three stages as a user runs them, at toy size: results, resuming, mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jiwer
import pytest
import torch
from conftest import ROOT, run, torchrun

from fairasr_min import checkpoint
from fairasr_min.conformer import SIZES
from fairasr_min.model import ConformerCTC
from fairasr_min.report import write_model_card
from fairasr_min.text import normalize, train_tokenizer

FEW = ["--epochs", 2, "--batch_size", 8, "--num_workers", 0]


def log_of(folder):
    """The log without its times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def same_tensors(a, b):
    """Two nested structures, tensors equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def same_run(a, b):
    """Weights, optimizer, best score and log of two runs are the same."""
    first, second = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (a, b))
    for state in (first, second):
        assert state.pop("log_size") > 0 and state.pop("arguments")  # differ in --out
    assert same_tensors(first, second)
    assert log_of(a) == log_of(b)
    return True


@pytest.fixture(scope="module")
def stages(demo, tmp_path_factory):
    """Folder with the outputs of the three stages, and what they printed."""
    out = tmp_path_factory.mktemp("stages")
    printed = {
        "pretrain": run(
            "train.py", "--manifest", demo / "train.jsonl", "--out", out / "pretrain",
            "--independent_space", "--balance_param", 0.1, *FEW,
        ),
        "finetune": run(
            "finetune.py", "--init", out / "pretrain" / "pretrained.pt", "--out", out / "finetune",
            "--by", "ethnicity", "--select", "worst", *FEW,
        ),
        "evaluate": run(
            "evaluate.py", "--model", out / "finetune" / "model.pt", "--out", out / "evaluate",
            "--by", "ethnicity", "gender+age",
        ),
    }  # fmt: skip
    return out, printed


def test_each_stage_says_synthetic_and_what_comes_next(stages):
    out, printed = stages
    assert all("SYNTHETIC" in text for text in printed.values())
    assert "next: python finetune.py --init" in printed["pretrain"]
    assert re.search("next: python evaluate.py --model .* --by ethnicity", printed["finetune"])


def test_stage_1_logs_both_losses_and_the_adversary(stages):
    out, _ = stages
    lines = log_of(out / "pretrain")
    for name in ("nce", "nce_acc", "fsc_ethnicity", "adv_acc_ethnicity", "adv_chance_ethnicity"):
        assert any(name in line for line in lines), name
        assert any(f"dev_{name}" in line for line in lines), name
    payload = torch.load(out / "pretrain" / "pretrained.pt", weights_only=True)
    assert payload["kind"] == "encoder" and payload["synthetic"] is True
    assert payload["labels"] == {"ethnicity": ["group_a", "group_b", "group_c"]}
    assert all(k.startswith(("encoder.", "log_mel.")) for k in payload["weights"])


def test_stage_2_starts_from_the_encoder_of_stage_1(stages, demo, tmp_path):
    out, _ = stages
    run(
        "finetune.py", "--init", out / "pretrain" / "pretrained.pt", "--out", tmp_path / "f",
        "--max_steps", 0,
    )  # fmt: skip
    before = torch.load(out / "pretrain" / "pretrained.pt", weights_only=True)["weights"]
    after = torch.load(tmp_path / "f" / "model.pt", weights_only=True)["weights"]
    assert all(torch.equal(before[k], after[k]) for k in before) and len(after) > len(before)


def test_the_report_agrees_with_jiwer_and_with_the_predictions_file(stages, tmp_path):
    out, printed = stages
    rows = [json.loads(line) for line in open(out / "evaluate" / "hyps.jsonl", encoding="utf-8")]
    report = json.loads((out / "evaluate" / "report.json").read_text())
    assert len(rows) == 40 and report["about"]["synthetic"] is True

    def wer(part):
        return jiwer.wer(
            [normalize(r["text"]) for r in part], [normalize(r["pred_text"]) for r in part]
        )

    assert report["overall"]["wer"] == pytest.approx(wer(rows))
    for group, counts in report["by"]["ethnicity"]["groups"].items():
        part = [r for r in rows if r["ethnicity"] == group]
        assert counts["wer"] == pytest.approx(wer(part)) and counts["utterances"] == len(part)
    crossed = report["by"]["gender+age"]["groups"]
    assert sum(c["words"] for c in crossed.values()) == report["overall"]["words"]
    markdown = (out / "evaluate" / "report.md").read_text()
    assert "Synthetic voices" in markdown and "| group_c |" in markdown

    again = run(
        "evaluate.py", "--predictions", out / "evaluate" / "hyps.jsonl", "--by", "ethnicity",
        "--out", tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["overall"] == report["overall"]
    table = re.search(r"(?s)ethnicity .*?\n\n", printed["evaluate"]).group()
    assert table.strip() in again


def test_the_model_card_says_on_whom_it_was_trained_and_how_it_does(stages, demo, tmp_path):
    out, _ = stages
    card = (out / "finetune" / "MODEL_CARD.md").read_text()
    rows = [json.loads(line) for line in open(demo / "train.jsonl", encoding="utf-8")]
    for group in ("group_a", "group_b", "group_c"):
        n = sum(row["ethnicity"] == group for row in rows)
        assert re.search(rf"(?m)^\| {group} \| {n} \| \d\.\d\d \|$", card)
    assert "SYNTHETIC" in card and "to hide: ethnicity" in card and "- epochs: 2" in card
    report = json.loads((out / "evaluate" / "report.json").read_text())
    for label, group in report["by"]["ethnicity"]["groups"].items():
        assert f"| {label} | {100 * group['wer']:.2f} |" in card  # evaluate.py has added it
    (tmp_path / "MODEL_CARD.md").write_text("by hand")
    write_model_card(tmp_path, {}, report)
    assert (tmp_path / "MODEL_CARD.md").read_text() == "by hand"
    (tmp_path / "MODEL_CARD.md").write_bytes(b"Mod\xe8le")  # no UTF-8: not ours either
    write_model_card(tmp_path, {}, report)
    assert (tmp_path / "MODEL_CARD.md").read_bytes() == b"Mod\xe8le"


def test_the_dev_wer_while_training_is_the_one_of_evaluate(stages, demo, tmp_path):
    out, _ = stages
    model = torch.load(out / "finetune" / "model.pt", weights_only=True)
    run(
        "evaluate.py", "--model", out / "finetune" / "model.pt", "--manifest", demo / "dev.jsonl",
        "--batch_size", 5, "--by", "ethnicity", "--out", tmp_path,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["overall"]["wer"] == model["dev"]["dev_wer"]
    worst = max(g["wer"] for g in report["by"]["ethnicity"]["groups"].values())
    assert worst == model["dev"]["dev_worst"]


def test_audio_prints_the_transcript_of_the_manifest_run(stages, demo):
    out, _ = stages
    row = json.loads(open(out / "evaluate" / "hyps.jsonl", encoding="utf-8").readline())
    printed = run(
        "evaluate.py", "--model", out / "finetune" / "model.pt",
        "--audio", demo / row["audio_filepath"],
    )  # fmt: skip
    assert printed.strip() == row["pred_text"]


def test_a_longer_run_replaces_the_result_of_a_shorter_one(demo, tmp_path):
    command = ["train.py", "--manifest", demo / "train.jsonl", "--out", tmp_path, *FEW]
    command += ["--grad_accum", 3]  # of 16 batches of two epochs: 5 steps
    run(*command, "--max_steps", 1)
    first = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    run(*command, "--max_steps", 2)
    second = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert (first["step"], second["step"]) == (1, 2)
    assert not same_tensors(first["weights"], second["weights"])
    run(*command)
    assert [line["epoch"] for line in log_of(tmp_path) if "epoch" in line] == [1, 2]
    whole = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    (tmp_path / "pretrained.pt").unlink()
    run(*command, "--max_steps", 2)  # which it is beyond
    again = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert again["step"] == 5 and same_tensors(again["weights"], whole["weights"])


def test_a_finished_run_is_left_alone_and_other_arguments_are_refused(stages, demo):
    out, _ = stages
    folder = out / "pretrain"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.is_file()}
    command = ["train.py", "--manifest", demo / "train.jsonl", "--out", folder, *FEW]
    again = run(*command, "--independent_space", "--balance_param", 0.1)
    assert "finished before" in again and "next: python finetune.py" in again
    refused = run(*command, "--balance_param", 0.5, code=2)
    assert "balance_param: 0.1 there, 0.5 now" in refused and "Traceback" not in refused
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    """A model file whose encoder has dropout, which size tiny has not."""
    path = tmp_path_factory.mktemp("init") / "model.pt"
    config = replace(SIZES["tiny"], d_model=16, n_layers=1, dropout=0.2, dropout_att=0.1)
    torch.manual_seed(0)
    tokenizer, _ = train_tokenizer(["a quick brown fox jumps over the lazy dog's vex wizard"], 99)
    weights = ConformerCTC(config, tokenizer).state_dict()
    checkpoint.save_model(path, "ctc", config, weights, tokenizer.model, {}, commit="")
    return path


@pytest.mark.parametrize("precision, workers", [("fp32", 0), ("bf16", 2)])
def test_stage_1_stopped_in_the_middle_of_an_epoch_goes_on_bitwise(
    demo, tmp_path, with_dropout, precision, workers
):
    command = [
        "train.py", "--init", with_dropout, "--manifest", demo / "train.jsonl",
        "--label", "ethnicity", "gender",
        "--epochs", 3, "--batch_size", 8, "--grad_accum", 2, "--save_every", 2,
        "--precision", precision, "--num_workers", workers,
    ]  # fmt: skip
    run(*command, "--out", tmp_path / "whole")
    # which gives the same numbers, and so may come and go
    first = ["--max_steps", 5, "--activation_checkpointing"]
    run(*command, "--out", tmp_path / "parts", *first)
    run(*command, "--out", tmp_path / "parts")
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_runs_killed_at_a_random_moment_go_on_bitwise(demo):
    """The short form of benchmarks/kill.py, which does it a hundred times."""
    printed = run("benchmarks/kill.py", "--corpus", demo, "--kills", 1)
    assert "2 of 2 runs ended bitwise as the uninterrupted ones" in printed


def test_sigterm_saves_and_leaves_no_older_result_behind(demo, tmp_path):
    command = ["train.py", "--manifest", demo / "train.jsonl", "--epochs", 500, "--out", tmp_path]
    run(*command, "--max_steps", 1)
    result, deadline = tmp_path / "pretrained.pt", time.time() + 120
    assert result.exists()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:]), "--num_workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while result.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    for _ in range(2):  # torchrun passes on what the terminal has sent already
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, the workers included
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in printed
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step > 1 and f"after step {step};" in printed
    assert not result.exists()  # of one step: stage 2 must not pick it up


def test_evaluation_by_two_processes_writes_the_same_file(stages, tmp_path):
    out, _ = stages
    code, printed = torchrun(
        "evaluate.py", "--model", out / "finetune" / "model.pt", "--by", "ethnicity",
        "--out", tmp_path / "e",
    )  # fmt: skip
    assert code == 0, printed
    one, two = ((d / "hyps.jsonl").read_text() for d in (out / "evaluate", tmp_path / "e"))
    assert one == two


MISTAKES = {
    "no stage-1 file": (["finetune.py"], r"python train.py.*--init none"),
    "no model": (["evaluate.py"], r"python finetune.py"),
    "stage-1 file as a model": (
        ["evaluate.py", "--model", "{out}/pretrain/pretrained.pt"], r"finetune.py --init",
    ),
    "unknown label": (
        ["train.py", "--manifest", "{demo}/train.jsonl", "--label", "race"],
        r"no column 'race'; columns there are: .*ethnicity",
    ),
    "unknown group": (
        ["evaluate.py", "--model", "{out}/finetune/model.pt", "--by", "race"],
        r"no column 'race'; columns there are: .*ethnicity",
    ),
    "no manifest": (["train.py", "--manifest", "nowhere.jsonl"], r"nowhere.jsonl"),
    "worst of what": (["finetune.py", "--select", "worst"], r"--by COL"),
    "another size": (
        ["finetune.py", "--init", "{out}/pretrain/pretrained.pt", "--size", "large"],
        r"--size large is not the size",
    ),
    "no GPU's precision": (["train.py", "--device", "cpu", "--precision", "fp16"], r"bf16"),
    "warm-up in steps": (["finetune.py", "--warmup", "500"], r"a number from 0 to 1 is expected"),
    "no batch": (["train.py", "--batch_size", "0"], r"--batch_size: 0: a number from 1 on"),
    "all audio elsewhere": (
        ["finetune.py", "--init", "none", "--train_manifest", "{out}/evaluate/hyps.jsonl",
         "--dev_manifest", "{demo}/dev.jsonl"],
        r"hyps.jsonl:1: no audio file at .*\n.*hyps.jsonl:2",
    ),
    "checkpoint of the other stage": (
        ["finetune.py", "--init", "none", "--train_manifest", "{demo}/train.jsonl",
         "--resume_ckpt", "{out}/pretrain/checkpoint.pt"],
        r"is of stage 1, not 2",
    ),
    "audio and groups": (["evaluate.py", "--audio", "{audio}", "--by", "age"], r"leave out --by"),
    "audio as a model": (["evaluate.py", "--model", "{audio}"], r"not a PyTorch file"),
    "out is a file": (
        ["train.py", "--manifest", "{demo}/train.jsonl", "--out", "{demo}/train.jsonl"],
        r"is a file; name a folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_message_and_exit_code_2(name, stages, demo, tmp_path):
    out, _ = stages
    command, message = MISTAKES[name]
    audio = next(demo.glob("audio/*/*.flac"))
    command = [part.format(out=out, demo=demo, audio=audio) for part in command]
    said = run(*command, cwd=tmp_path, code=2)
    assert re.search(message, said) and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
