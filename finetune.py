"""Stage 2 of FairASR: a speech recogniser from the pretrained encoder.

    python finetune.py

The encoder of stage 1 and one linear layer learn to transcribe with CTC (Graves et al., 2006):

    waveform -> log-mel -> SpecAugment -> Conformer -> Linear -> log-softmax -> CTC(text)

The best checkpoint is chosen on the dev manifest, by its word error rate or by that of its worst
group; the test manifest is never looked at. Writes runs/finetune/model.pt for evaluate.py.
"""

import argparse
import os
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from fairasr_min import checkpoint, data, losses, report, runtime, wer
from fairasr_min.audio import AudioError, SpecAugment
from fairasr_min.conformer import SIZES
from fairasr_min.decode import decode
from fairasr_min.graphs import record_steps
from fairasr_min.model import ConformerCTC, samples_to_frames
from fairasr_min.runtime import at_least
from fairasr_min.text import Tokenizer, normalize, train_tokenizer

PRETRAINED = "runs/pretrain/pretrained.pt"

# The defaults of the arguments are those of the original's code; README.md says where they are not.
# On the demo corpus, for two CPU cores, these replace them:
DEMO = dict(epochs=11, batch_size=16, lr=3e-3, min_lr=3e-5)  # and size tiny

# Masks as NeMo trains its Conformers: five of up to 5 % of the time, two of up to 26 mel bins.
# Size tiny underfits with so many, and gets fewer (RESULTS.md).
AUGMENT = SpecAugment(time_masks=5, time_width=0.05, freq_masks=2, freq_width=27)
AUGMENT_TINY = SpecAugment(time_masks=2, time_width=0.05, freq_masks=2, freq_width=15)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    # fmt: off
    # data
    add("--train_manifest", metavar="FILE",
        help="(stage 1's; without one, Fair-Speech if prepared, else the demo)")
    add("--dev_manifest", metavar="FILE",
        help="chooses the checkpoint (stage 1's, if the training manifest is; else dev.jsonl "
             "beside that)")
    add("--audio_root", metavar="DIR",
        help="where the audio lies, if not where the manifest says")
    add("--max_seconds", type=at_least(0.01, float), default=17.5, metavar="F",
        help="leave out longer training utterances, counted by group (%(default)s)")
    add("--max_bad", type=at_least(0), default=0, metavar="N",
        help="go on without up to this many bad rows (%(default)s)")
    add("--vocab_size", type=at_least(2, most=10**6), default=256, metavar="N",
        help="sentencepiece units from the training text; characters if it is small (%(default)s)")
    # choosing the checkpoint
    add("--select", choices=["mean", "worst"], default="mean",
        help="by dev WER over all, or by that of the worst group of --by (%(default)s)")
    add("--by", metavar="COL",
        help="group column for --select worst, which needs it; its worst WER is logged")
    add("--patience", type=at_least(0), default=0, metavar="N",
        help="stop after N epochs without a better one; 0: never (%(default)s)")
    # model and training
    add("--init", default=PRETRAINED, metavar="X",
        help="model to start from, which fixes size (and units, if it has a CTC head): a file of "
             "ours, a .nemo archive, its https address or Hugging Face name; none: from scratch "
             "(%(default)s)")
    add("--size", choices=list(SIZES),
        help="of the encoder, from scratch (small; demo: tiny)")
    add("--epochs", type=at_least(1), default=50, metavar="N",
        help="passes over the data (50; demo: %d)" % DEMO["epochs"])
    add("--max_steps", type=at_least(0), metavar="N",
        help="stop early after N steps; the learning rate still follows --epochs")
    add("--batch_size", type=at_least(1), default=32, metavar="N",
        help="utterances per process (32; demo: %d)" % DEMO["batch_size"])
    add("--batch_seconds", type=at_least(0.01, float), metavar="F",
        help="instead of --batch_size: at most about so many seconds of audio per process")
    add("--grad_accum", type=at_least(1), default=1, metavar="N",
        help="batches per step (%(default)s)")
    add("--lr", type=at_least(0, float), default=1e-4, metavar="F",
        help="peak learning rate (1e-4; demo: %g)" % DEMO["lr"])
    add("--min_lr", type=at_least(0, float), default=1e-5, metavar="F",
        help="where its cosine ends (1e-5; demo: %g)" % DEMO["min_lr"])
    add("--warmup", type=at_least(0, float, 1), default=0.05, metavar="F",
        help="fraction of the steps in which it rises (%(default)s)")
    add("--grad_clip", type=at_least(1e-9, float), default=1.0, metavar="F",
        help="largest gradient norm (%(default)s)")
    # running
    add("--out", default="runs/finetune", metavar="DIR",
        help="the same command again goes on where it was (%(default)s)")
    add("--resume_ckpt", metavar="FILE",
        help="checkpoint.pt of a run with the same arguments, to go on from in a new --out")
    add("--save_every", type=at_least(1), default=500, metavar="N",
        help="steps between checkpoints, besides one per epoch (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="of weights, batches, masks and dropout (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32",
        help="of matrix products; loss and features stay fp32 (%(default)s)")
    add("--activation_checkpointing", action="store_true",
        help="keep each encoder layer's input only, and compute the rest again for the gradient: "
             "less memory for long clips or large models, a fifth to a third more time")
    add("--compile", action="store_true",
        help="the encoder's layers by torch.compile: faster steps after a minute (GPU only)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: a GPU if there is one (%(default)s)")
    add("--num_workers", type=at_least(0), default=0, metavar="N",
        help="processes that read audio ahead; 8 or more feed a GPU (%(default)s)")
    # fmt: on
    return p


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    world = runtime.setup(args.device)
    runtime.check_supported(args.precision, world.device, args.compile)
    if args.select == "worst" and not args.by:
        raise runtime.UserError("--select worst needs --by COL: the worst group of which column?")

    # ---- arguments that depend on the corpus or on the model to start from. They are parsed again
    # after set_defaults: a new default gives way to what was typed.
    initial = None
    if args.init != "none":
        if args.init == PRETRAINED and not Path(args.init).exists():
            raise runtime.UserError(
                f"{args.init} is not there: run stage 1 first (python train.py "
                "--independent_space --balance_param 0.1), or give --init none to do without"
            )
        with runtime.first_process_first(world):  # which may have to download it
            initial = checkpoint.load_model_file(args.init)
        before = initial["arguments"]  # none in a .nemo archive
        if args.train_manifest is None and before:
            parser.set_defaults(
                train_manifest=before.get("train_manifest") or before.get("manifest"),
                dev_manifest=before.get("dev_manifest"),
                audio_root=before.get("audio_root"),
            )
    args = parser.parse_args()
    if args.train_manifest is None:
        with runtime.first_process_first(world):
            corpus = data.default_corpus(world.say)
        parser.set_defaults(train_manifest=str(corpus / "train.jsonl"))
        args = parser.parse_args()
    demo = data.is_demo(args.train_manifest)
    if demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    if args.dev_manifest is None:
        args.dev_manifest = str(Path(args.train_manifest).parent / "dev.jsonl")
    if initial:
        if args.size and SIZES[args.size] != initial["config"]:
            raise runtime.UserError(f"--size {args.size} is not the size of {args.init}; drop it")
    else:
        args.size = args.size or ("tiny" if demo else "small")
    out = Path(args.out)
    record = {
        "stage": 2,
        **vars(args),
        "processes": world.size,
        "manifest_sha256": data.fingerprint(args.train_manifest),
        "dev_sha256": data.fingerprint(args.dev_manifest),
        "init_sha256": data.fingerprint(initial["path"]) if initial else None,
    }
    state = checkpoint.resume(out, record, args.resume_ckpt)
    runtime.agree({**record, "checkpoint": state["step"] if state else None})

    # ---- data: every row is checked before anything is computed
    utterances, bad = data.read_manifest(
        args.train_manifest, args.audio_root, "required", world.main
    )
    if not utterances:
        data.settle(args.train_manifest, utterances, bad, args.max_bad, world.say)  # says why
    if initial and initial["tokenizer"]:
        tokenizer, units = Tokenizer(initial["tokenizer"]), f"those of {args.init}"
    else:
        tokenizer, units = train_tokenizer([u.text for u in utterances], args.vocab_size)
    config = initial["config"] if initial else SIZES[args.size]
    bad += data.check_targets(
        utterances, tokenizer.encode, lambda n: samples_to_frames(n, config), tokenizer.unknown
    )
    utterances = data.settle(args.train_manifest, utterances, bad, args.max_bad, world.say)
    utterances = data.drop_long(utterances, args.max_seconds, world.say)
    augment = AUGMENT_TINY if config == SIZES["tiny"] else AUGMENT
    train_set = data.SpeechDataset(
        utterances, args.seed, tokenizer=tokenizer, n_draws=augment.n_draws
    )
    batches = data.Batches(
        [u.seconds for u in utterances], args.batch_size, args.seed, world.size, args.batch_seconds
    )
    dev, bad = data.read_manifest(args.dev_manifest, args.audio_root, "required", world.main)
    dev = data.settle(args.dev_manifest, dev, bad, args.max_bad, world.say)
    if args.by:
        data.require_columns(args.dev_manifest, [u.row for u in dev], [args.by])
        if not any(data.label_of(u.row, args.by) for u in dev):
            raise runtime.UserError(f"{args.dev_manifest}: no utterance has a value of {args.by}")
    synthetic = data.is_synthetic(utterances)
    if not (steps := args.epochs * len(batches) // args.grad_accum):
        raise runtime.UserError(
            f"--grad_accum {args.grad_accum}: there are {args.epochs * len(batches)} batches in all"
        )
    last = steps if args.max_steps is None else min(steps, args.max_steps)

    # ---- model
    runtime.seed_everything(args.seed)
    model = ConformerCTC(config, tokenizer)
    model.encoder.checkpointing = args.activation_checkpointing
    model.encoder.compiled = args.compile
    if initial:
        head = ("decoder",) if "decoder.weight" in initial["weights"] else ()
        checkpoint.load_weights(model, initial, args.init, ("encoder", "log_mel", *head))
    model.to(world.device)
    weights = runtime.joined(model)
    if world.device.type == "cuda" and world.size == 1:  # nobody has tried it on several GPUs
        record_steps(model.encoder)
    # eps: gradients far below 1e-6 are rounding noise, of which 1e-8 makes steps of full size
    optimizer = torch.optim.AdamW([weights], lr=args.lr, weight_decay=0.01, eps=1e-6, fused=True)
    scaler = runtime.grad_scaler(args.precision, world.device)
    meter = runtime.Meter(world.device, state["meter"] if state else None)
    first, best, since_best = 0, None, 0
    if state:
        first, best, since_best = state["step"], state["best"], state["since_best"]
    finished = first >= last or bool(args.patience and since_best >= args.patience)

    def compute(batch):
        """CTC loss in nats, the mean over the utterances of all processes' batches."""
        features, n_frames = model.log_mel(batch.waveforms, batch.n_samples)  # (B, T, F), (B,)
        features = augment(features, n_frames, batch.draws)
        with runtime.autocast(args.precision, world.device):
            log_probs, lengths = model.log_probs(features, n_frames)  # (B, T', V+1) float32
        loss = losses.ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths)  # (B,)
        n = runtime.total(torch.tensor(len(loss)))  # of all processes; known to the host
        return loss.sum() * world.size / n  # averaging the gradients divides by the processes

    def watch_dev():
        """Dev WER, that of the worst group of --by, and one line to look at."""
        texts = decode(model, dev, world, args.batch_size, args.precision, args.num_workers)
        errors = [wer.count_errors(u.text, normalize(text)) for u, text in zip(dev, texts)]
        seen = {"dev_wer": wer.add(errors).wer, "dev_empty": texts.count("") / len(texts)}
        if args.by:
            groups = wer.by_group(errors, [data.label_of(u.row, args.by) for u in dev])
            seen["dev_worst"] = max(e.wer for g, e in groups.items() if g is not None)
        return seen, f"{dev[0].text!r} heard as {texts[0]!r}"

    # ---- what will happen
    hours = sum(u.seconds for u in utterances) / 3600
    world.say(
        f"stage 2: {args.train_manifest}{' (SYNTHETIC)' if synthetic else ''}, "
        f"{len(utterances):,} utterances, {hours:.2f} h; units: {units}\n"
        f"  {sum(p.numel() for p in model.parameters()):,} parameters, encoder from "
        f"{args.init if initial else f'scratch, size {args.size}'}; {last} steps, "
        f"{world.size} process(es) on {world.device.type}, {args.precision}"
    )
    world.say("  " + " ".join(f"{k}={v}" for k, v in vars(args).items()))
    result = out / "model.pt"

    def finish():
        which = "worst-group " if args.select == "worst" else ""
        chosen = "" if best is None else f" (best {which}dev WER {100 * best:.2f} %)"
        model_flag = "" if args.out == "runs/finetune" else f" --model {shlex.quote(str(result))}"
        hidden = initial.get("labels") if initial else None  # by stage 1
        columns = [args.by] if args.by else hidden or data.group_columns([u.row for u in dev])[:1]
        by = f" --by {shlex.join(columns)}" if columns else ""
        world.say(f"stage 2 done: {result}{chosen}\nnext: python evaluate.py{model_flag}{by}")
        return 0

    if finished and result.exists():
        world.say(f"  finished before, at step {first}")
        return finish()
    if state:
        checkpoint.restore(state, model=model, optimizer=optimizer, scaler=scaler)
        world.say(f"  going on from step {first}")
    lost = best is not None and not result.exists()
    if lost:  # a run that goes on here from elsewhere has left its best model there
        beside = Path(state["path"]).with_name("model.pt")
        found = checkpoint.load_model_file(beside) if beside.exists() else {"dev": {}}
        if found["dev"].get("dev_worst" if args.select == "worst" else "dev_wer") != best:
            raise runtime.UserError(
                f"{result}, the best model of this run so far, is missing: put it back beside the "
                f"checkpoint ({beside}), or begin a new run with another --out"
            )
        checkpoint.same_arguments(found["arguments"], record, beside)
    if world.main:
        checkpoint.start(out, record)
        if lost:
            shutil.copyfile(beside, unfinished := out / ".model.pt.unfinished")
            os.replace(unfinished, result)
        if best is None:
            result.unlink(missing_ok=True)  # of the same run with a smaller --max_steps
    if finished and lost:
        return finish()
    log = runtime.Log(out, world, state["log_size"] if state else 0, first)
    stop = runtime.Stop()

    def save(step):
        size = log.size()
        if world.main:
            checkpoint.save_state(out, {
                "arguments": record,
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "meter": meter.state.tolist(),
                "best": best,
                "since_best": since_best,
                "log_size": size,
            })  # fmt: skip

    about = {
        "stage": 2,
        "labels": initial.get("labels", {}) if initial else {},
        "synthetic": synthetic,
        "commit": runtime.commit(),
        "stage1": initial["arguments"] if initial else None,
        "training": {
            "manifest": args.train_manifest,
            "sha256": record["manifest_sha256"],
            "utterances": len(utterances),
            "hours": hours,
            "groups": data.describe(utterances),
        },
    }

    def save_best(step, seen):
        if world.main:
            found = {**about, "step": step, "dev": seen}
            checkpoint.save_model(
                result, "ctc", config, model.state_dict(), tokenizer.model, record, **found
            )
            report.write_model_card(out, {**found, "config": asdict(config), "arguments": record})

    # ---- the loop
    accum, buffers = args.grad_accum, list(model.encoder.buffers())  # of its BatchNorms
    stream = data.stream(
        train_set, batches, first * accum, last * accum,
        world.rank, world.size, args.num_workers, world.device.type == "cuda",
    )  # fmt: skip
    bar = runtime.Progress("stage 2", first, last, world)
    for step in range(first, last):
        lr = runtime.lr_at(step, steps, args.lr, args.warmup, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        runtime.seed_everything(args.seed, step + 1, world.rank)  # dropout
        before = [b.clone() for b in buffers]  # put back if the step is skipped
        ctc, held = 0.0, []  # the loss, indices of utterances
        for _ in range(accum):
            batch = next(stream)
            held += batch.index
            bar.heard(batch.n_samples)
            loss = compute(batch.to(world.device))
            scaler.scale(loss / accum).backward()
            ctc = ctc + loss.detach() / accum
        norm, done = runtime.update(weights, optimizer, scaler, buffers, before, args.grad_clip)
        ctc = runtime.total(ctc) / world.size  # the mean over all processes' utterances
        meter.add({"ctc": ctc, "grad_norm": norm}, done)

        n = step + 1  # steps done
        epoch, left = divmod(n * accum, len(batches))
        ended = left < accum or n == steps  # this step has reached into a new epoch
        epoch = args.epochs if n == steps else epoch
        if n % runtime.LOG_EVERY == 0 or n == last:
            over = n == last and args.precision != "fp16"  # which looks for its scale at first
            runtime.stop_if_diverged(meter, utterances, held, over)
        if n % runtime.LOG_EVERY == 0 or n == steps:
            means = {"lr": lr, **meter.read()}
            log.write(n, **means)
            bar.show(means)
        if ended:
            seen, example = watch_dev()
            score = seen["dev_worst" if args.select == "worst" else "dev_wer"]
            since_best += 1
            if best is None or score < best:
                best, since_best = score, 0
                save_best(n, seen)
            log.write(n, epoch=epoch, best=best, **seen)
            mark = " (best)" if since_best == 0 else ""
            bar.line(f"epoch {epoch}/{args.epochs}: {runtime.rounded(seen)}{mark}; {example}")
        bar.update()
        signal = stop.agreed()
        if ended or n % args.save_every == 0 or n == last or signal:
            save(n)
        if ended:
            runtime.return_memory()
        if signal:
            bar.close()
            world.say(f"stopped by signal {signal} after step {n}; the same command goes on")
            return 128 + signal
        if args.patience and since_best >= args.patience:
            world.say(f"no better checkpoint for {since_best} epochs: stopping at step {n}")
            break
    bar.close()

    # ---- the result
    if best is None:  # stopped by --max_steps before the end of the first epoch
        save_best(max(first, last), {})
    return finish()


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError, checkpoint.CheckpointError))
