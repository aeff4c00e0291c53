"""Files that others read, and what a run goes on from."""

import json
import pickle

import pytest
import torch

from fairasr_min import checkpoint, runtime
from fairasr_min.checkpoint import CheckpointError
from fairasr_min.conformer import ConformerConfig
from fairasr_min.model import ConformerCTC
from fairasr_min.text import train_tokenizer

CONFIG = ConformerConfig(d_model=16, n_layers=1, n_heads=2, conv_kernel=3, subsampling_channels=4)


def model_file(path, kind="ctc"):
    tokenizer, _ = train_tokenizer(["call mom", "stop it"], 50)
    model = ConformerCTC(CONFIG, tokenizer).eval()
    weights = model.state_dict()
    if kind == "encoder":
        weights = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    checkpoint.save_model(path, kind, CONFIG, weights, tokenizer.model, {"a": 1}, commit="x")
    return model


def test_a_model_file_gives_the_same_recogniser(tmp_path):
    model = model_file(tmp_path / "model.pt")
    again = checkpoint.load_model(tmp_path / "model.pt")
    waveforms = [torch.randn(8000), torch.randn(5000)]
    assert again.transcribe(waveforms) == model.transcribe(waveforms)
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_a_part_of_joined_weights_is_saved_alone(tmp_path):
    """They are views of all weights, of which a plain torch.save would write all."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(1000, 1000))
    runtime.joined(model)
    weights = {"0.weight": model[0].weight}
    checkpoint.save_model(tmp_path / "model.pt", "encoder", CONFIG, weights, None, {}, commit="x")
    assert (tmp_path / "model.pt").stat().st_size < 100_000
    assert torch.equal(torch.load(tmp_path / "model.pt")["weights"]["0.weight"], model[0].weight)


def test_a_stage_1_file_says_what_to_run(tmp_path):
    model_file(tmp_path / "pretrained.pt", "encoder")
    with pytest.raises(CheckpointError, match="finetune.py --init"):
        checkpoint.load_model(tmp_path / "pretrained.pt")


class Payload:
    def __reduce__(self):
        return (open, ("it-ran", "w"))


@pytest.mark.parametrize("content", ["nothing", "text", "half", "pickle", "other", "list"])
def test_what_is_not_a_model_file_is_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    model_file(path)
    whole = path.read_bytes()
    if content == "other":
        torch.save({"weights": {}}, path)
    elif content == "list":
        torch.save([1, 2], path)
    else:
        pieces = {"nothing": b"", "text": b"hello", "half": whole[: len(whole) // 2]}
        path.write_bytes(
            pieces.get(content) or (pickle.dumps(Payload()) if content == "pickle" else b"")
        )
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "it-ran").exists()


def test_weights_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    model_file(path)
    payload = torch.load(path, weights_only=True)
    payload["weights"]["decoder.bias"] = torch.zeros(3)
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.load_model(path)


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"format": 1, "n": 1})

    def full(payload, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(path, {"format": 1, "n": 2})
    assert checkpoint.load(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def run_folder(tmp_path, arguments, steps=(1, 2)):
    checkpoint.start(tmp_path, arguments)
    for step in steps:
        state = {"step": step, "arguments": arguments, "log_size": 9, "meter": []}
        checkpoint.save_state(tmp_path, state)


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    arguments = {"lr": 0.1, "label": ["a"], "max_steps": 5}
    assert checkpoint.resume(tmp_path / "new", arguments) is None
    run_folder(tmp_path, arguments)
    assert checkpoint.resume(tmp_path, {**arguments, "max_steps": None})["step"] == 2
    newer = {**arguments, "compile": False}  # an argument that was not there when it began
    assert checkpoint.resume(tmp_path, newer)["step"] == 2


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    run_folder(tmp_path, {})
    last = tmp_path / "checkpoint.pt"
    last.write_bytes(last.read_bytes()[:100] if damage is None else damage)
    assert checkpoint.resume(tmp_path, {})["step"] == 1
    assert "checkpoint.pt" in capsys.readouterr().err
    last.unlink()  # killed between the two renames
    assert checkpoint.resume(tmp_path, {})["step"] == 1
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="start anew"):
        checkpoint.resume(tmp_path, {})


def test_other_arguments_are_listed(tmp_path):
    run_folder(tmp_path, {"lr": 0.1, "seed": 0, "device": "cpu"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"(?s)lr: 0.1 there, 0.2 now.*another --out"):
        checkpoint.resume(tmp_path, {"lr": 0.2, "seed": 0, "device": "cuda"})
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_another_runs_checkpoint_begins_a_new_folder_and_only_that(tmp_path):
    run_folder(tmp_path / "a", {"stage": 1, "lr": 0.1})
    given = tmp_path / "a" / "checkpoint.pt"
    fresh = checkpoint.resume(tmp_path / "b", {"stage": 1, "lr": 0.1}, given)
    assert fresh["step"] == 2 and fresh["log_size"] == 0  # the log stays in a
    with pytest.raises(CheckpointError, match="lr: 0.1 there, 0.5 now"):
        checkpoint.resume(tmp_path / "b", {"stage": 1, "lr": 0.5}, given)
    with pytest.raises(CheckpointError, match="is of stage 1, not 2"):
        checkpoint.resume(tmp_path / "b", {"stage": 2, "lr": 0.1}, given)
    run_folder(tmp_path / "b", {"stage": 1, "lr": 0.1}, steps=(7,))
    assert checkpoint.resume(tmp_path / "b", {"stage": 1, "lr": 0.1}, given)["step"] == 7


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.resume(tmp_path / "file", {})
    (tmp_path / "model.pt").write_text("precious")
    with pytest.raises(CheckpointError, match="another --out"):
        checkpoint.resume(tmp_path, {})
    assert (tmp_path / "model.pt").read_text() == "precious"


def test_a_model_file_is_no_state_and_the_other_way_round(tmp_path):
    model_file(tmp_path / "model.pt")
    run_folder(tmp_path / "run", {"a": 1})
    with pytest.raises(CheckpointError, match="--init"):
        checkpoint.resume(tmp_path / "else", {}, resume_ckpt=tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="state of a run; its model is"):
        checkpoint.load_model(tmp_path / "run" / "checkpoint.pt")
    assert json.loads((tmp_path / "run" / "args.json").read_text()) == {"a": 1}


def test_an_export_overwrites_no_model(tmp_path, monkeypatch, capsys):
    model_file(tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    for out, reason in (("model.pt", "must end in .nemo"), ("same.nemo", "is the model itself")):
        source = tmp_path / "model.pt"
        if out == "same.nemo":
            assert checkpoint.export(checkpoint.load_model(source), tmp_path / out) is None
            source, before = tmp_path / out, (tmp_path / out).read_bytes()
        command = ["checkpoint", "export", str(source), str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", command)
        assert checkpoint.main() == 2 and reason in capsys.readouterr().err
        assert source.read_bytes() == before


@pytest.mark.parametrize(
    "name, value",
    [("step", -5), ("step", None), ("log_size", "9"), ("meter", None), ("best", "x")],
)
def test_a_state_of_another_version_is_refused_in_one_line(tmp_path, name, value):
    run_folder(tmp_path, {}, steps=(1,))
    payload = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**payload, name: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"checkpoint.pt: {name} is .* version"):
        checkpoint.load_state(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("steps", [(1, 2), (2,)])
def test_a_save_cut_off_at_its_last_step_can_be_gone_on_from(tmp_path, steps):
    """As often as it takes: the one before was damaged, or it is the first."""
    run_folder(tmp_path, {}, steps)
    (tmp_path / "checkpoint.pt").rename(tmp_path / ".checkpoint.fresh")
    if len(steps) > 1:
        (tmp_path / "previous.pt").write_bytes(b"damaged")
    for _ in range(3):
        assert checkpoint.resume(tmp_path, {})["step"] == 2
        checkpoint.start(tmp_path, {})
    assert not (tmp_path / ".checkpoint.fresh").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_what_another_process_has_written_meanwhile_is_left_alone(tmp_path, begun):
    if begun:
        run_folder(tmp_path, {"lr": 1})
    checkpoint.resume(tmp_path, {"lr": 1})
    (tmp_path / "args.json").write_text('{"lr": 2}')
    (tmp_path / "pretrained.pt").write_text("theirs")
    with pytest.raises(CheckpointError, match="another process has written there"):
        checkpoint.start(tmp_path, {"lr": 1})
    assert (tmp_path / "args.json").read_text() == '{"lr": 2}'


def test_a_model_of_nan_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    model_file(path)
    payload = torch.load(path, weights_only=True)
    payload["weights"]["encoder.pre_encode.out.bias"][3] = float("nan")
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=r"encoder.pre_encode.out.bias: NaN or infinite"):
        checkpoint.load_model(path)
