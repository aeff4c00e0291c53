"""Stage 1 of FairASR: contrastive pretraining of the encoder.

    python train.py --independent_space --balance_param 0.1

Two views of each utterance should be encoded alike (InfoNCE). A second contrastive loss (FSC)
trains a head to tell demographic groups apart, and through a gradient reversal trains the encoder
to hide them:

    waveform -> log-mel -> two views -> Conformer -> mean over time = h
    z     = g(h)                                  InfoNCE(z of view 1, z of view 2)
    z_rev = g(reverse(h)), or a head of its own   FSC(z_rev, labels)
    loss  = InfoNCE + balance_param * FSC

The original continues an encoder that was trained to recognise speech (here: --init
nvidia/stt_en_conformer_ctc_small); without --init training starts from scratch. Writes
runs/pretrain/pretrained.pt, which finetune.py picks up. Kim et al., "FairASR", Interspeech 2025.
"""

import argparse
import shlex
from pathlib import Path

import torch

from fairasr_min import checkpoint, data, losses, runtime
from fairasr_min.audio import AudioError, SpecAugment
from fairasr_min.conformer import SIZES
from fairasr_min.graphs import record_steps
from fairasr_min.model import FairASR
from fairasr_min.runtime import at_least

# The defaults of the arguments are those of the original's code; README.md says where they are not.
# On the demo corpus, which two CPU cores should manage in a minute, these replace them:
DEMO = dict(epochs=2, lr=1e-3, min_lr=1e-4)  # and size tiny

# One time mask of up to 36 frames of 10 ms (the original: up to 29 of 12.5 ms), and, ours alone,
# one frequency mask of up to 14 mel bins. The mask is 0, the mean of the features.
AUGMENT = SpecAugment(time_masks=1, time_width=37, freq_masks=1, freq_width=15)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    # fmt: off
    # data
    add("--manifest", metavar="FILE",
        help="training manifest (Fair-Speech if prepared, else the demo corpus)")
    add("--dev_manifest", metavar="FILE",
        help="watched each epoch, nothing is chosen by it (dev.jsonl beside --manifest, if there)")
    add("--audio_root", metavar="DIR",
        help="where the audio lies, if not where the manifest says")
    add("--max_seconds", type=at_least(0.01, float), default=17.5, metavar="F",
        help="leave out longer utterances, counted by group (%(default)s)")
    add("--max_bad", type=at_least(0), default=0, metavar="N",
        help="go on without up to this many bad rows (%(default)s)")
    # method
    add("--label", nargs="+", default=["ethnicity"], metavar="COL",
        help="demographic columns to hide; several: one FSC term each, averaged (ethnicity)")
    add("--independent_space", action="store_true",
        help="a projection head of its own for each FSC term, instead of the shared one")
    add("--balance_param", type=at_least(0, float), default=0.1, metavar="F",
        help="weight of FSC; 0 is plain SimCLR, without --label (%(default)s)")
    add("--temperature", type=at_least(1e-3, float), default=0.5, metavar="F",
        help="of InfoNCE (%(default)s)")
    add("--fsc_temperature", type=at_least(1e-3, float), default=0.2, metavar="F",
        help="of FSC (%(default)s)")
    add("--fsc_positives", choices=["all", "others"], default="all",
        help="all: an utterance's own other view counts as a positive (the original); others: only "
             "other utterances of its group, so that FSC never fights InfoNCE over a pair")
    add("--no_fsc_normalize", action="store_true",
        help="FSC of unnormalised projections, as in the paper's code")
    add("--augment", choices=["second", "both"], default="second",
        help="which views are masked (%(default)s, as in the paper's code)")
    # model and training
    add("--init", default="none", metavar="X",
        help="model to start from, which fixes the size: a file of ours, a .nemo archive, its "
             "https address or Hugging Face name; none: from scratch (%(default)s)")
    add("--size", choices=list(SIZES),
        help="of the encoder, from scratch (small; demo: tiny)")
    add("--epochs", type=at_least(1), default=50, metavar="N",
        help="passes over the data (50; demo: %d)" % DEMO["epochs"])
    add("--max_steps", type=at_least(0), metavar="N",
        help="stop early after N steps; the learning rate still follows --epochs")
    add("--batch_size", type=at_least(1), default=32, metavar="N",
        help="utterances per process; all processes' together are the negatives (%(default)s)")
    add("--grad_accum", type=at_least(1), default=1, metavar="N",
        help="batches per step; adds no negatives (%(default)s)")
    add("--lr", type=at_least(0, float), default=1e-4, metavar="F",
        help="peak learning rate (1e-4; demo: %g)" % DEMO["lr"])
    add("--min_lr", type=at_least(0, float), default=1e-6, metavar="F",
        help="where its cosine ends (1e-6; demo: %g)" % DEMO["min_lr"])
    add("--warmup", type=at_least(0, float, 1), default=0.05, metavar="F",
        help="fraction of the steps in which it rises (%(default)s)")
    add("--grad_clip", type=at_least(1e-9, float), default=1.0, metavar="F",
        help="largest gradient norm (%(default)s)")
    # running
    add("--out", default="runs/pretrain", metavar="DIR",
        help="the same command again goes on where it was (%(default)s)")
    add("--resume_ckpt", metavar="FILE",
        help="checkpoint.pt of a run with the same arguments, to go on from in a new --out")
    add("--save_every", type=at_least(1), default=500, metavar="N",
        help="steps between checkpoints, besides one per epoch (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N",
        help="of weights, batches, masks and dropout (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32",
        help="of matrix products; losses and features stay fp32 (%(default)s)")
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
    if args.batch_size * world.size == 1:
        raise runtime.UserError("--batch_size 1: nothing to contrast an utterance with; 2 or more")

    # ---- arguments that depend on the corpus or on the model to start from. They are parsed again
    # after set_defaults: a new default gives way to what was typed.
    if args.manifest is None:
        with runtime.first_process_first(world):
            parser.set_defaults(manifest=str(data.default_corpus(world.say) / "train.jsonl"))
        args = parser.parse_args()
    demo = data.is_demo(args.manifest)
    if demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args()
    if args.dev_manifest is None and (Path(args.manifest).parent / "dev.jsonl").exists():
        args.dev_manifest = str(Path(args.manifest).parent / "dev.jsonl")
    initial = None
    if args.init != "none":
        with runtime.first_process_first(world):  # which may have to download it
            initial = checkpoint.load_model_file(args.init)
        if args.size and SIZES[args.size] != initial["config"]:
            raise runtime.UserError(f"--size {args.size} is not the size of {args.init}; drop it")
    else:
        args.size = args.size or ("tiny" if demo else "small")
    labels = list(dict.fromkeys(args.label)) if args.balance_param else []
    out = Path(args.out)
    record = {
        "stage": 1,
        **vars(args),
        "processes": world.size,
        "manifest_sha256": data.fingerprint(args.manifest),
        "init_sha256": data.fingerprint(initial["path"]) if initial else None,
    }
    state = checkpoint.resume(out, record, args.resume_ckpt)
    runtime.agree({**record, "checkpoint": state["step"] if state else None})

    # ---- data: every row is checked before anything is computed
    def load(manifest):
        utterances, bad = data.read_manifest(manifest, args.audio_root, "unused", world.main)
        utterances = data.settle(manifest, utterances, bad, args.max_bad, world.say)
        return data.drop_long(utterances, args.max_seconds, world.say)

    utterances = load(args.manifest)
    values = data.label_values(args.manifest, utterances, labels, world.say)

    def batched(manifest, utterances):
        """Data set and batches; utterances of similar length, and so the negatives, share one."""
        ids, draws = data.label_ids(utterances, values), 2 * AUGMENT.n_draws  # for two views
        if len(utterances) < max(2, world.size):
            raise data.ManifestError(
                f"{manifest}: {len(utterances)} utterance(s) left, too few: a batch contrasts two "
                "or more, at least one for each process"
            )
        seconds = [u.seconds for u in utterances]
        return (
            data.SpeechDataset(utterances, args.seed, ids, n_draws=draws),
            data.Batches(seconds, args.batch_size, args.seed, world.size, smallest=2),
        )

    train_set, batches = batched(args.manifest, utterances)
    dev_set = dev_batches = None
    if args.dev_manifest:
        dev_set, dev_batches = batched(args.dev_manifest, load(args.dev_manifest))
    synthetic = data.is_synthetic(utterances)
    if not (steps := args.epochs * len(batches) // args.grad_accum):
        raise runtime.UserError(
            f"--grad_accum {args.grad_accum}: there are {args.epochs * len(batches)} batches in all"
        )
    last = steps if args.max_steps is None else min(steps, args.max_steps)

    # ---- model
    config = initial["config"] if initial else SIZES[args.size]
    runtime.seed_everything(args.seed)
    model = FairASR(config, len(labels), args.independent_space)
    model.encoder.checkpointing = args.activation_checkpointing
    model.encoder.compiled = args.compile
    carried = {}  # what the initial recogniser knows beyond the encoder travels on to stage 2
    if initial:
        checkpoint.load_weights(model, initial, args.init, ("encoder", "log_mel"))
        carried = {k: w for k, w in initial["weights"].items() if k.startswith("decoder.")}
    model.to(world.device)
    weights = runtime.joined(model)
    if world.device.type == "cuda" and world.size == 1:  # nobody has tried it on several GPUs
        record_steps(model.encoder)
    # eps: gradients far below 1e-6 are rounding noise, of which 1e-8 makes steps of full size
    optimizer = torch.optim.AdamW([weights], lr=args.lr, weight_decay=0.01, eps=1e-6, fused=True)
    scaler = runtime.grad_scaler(args.precision, world.device)
    meter = runtime.Meter(world.device, state["meter"] if state else None)
    first = state["step"] if state else 0

    # ---- one batch: two views, one encoder pass, both losses
    def compute(batch):
        """The loss over all processes' utterances, and its parts by name (README: the log)."""
        features, n_frames = model.log_mel(batch.waveforms, batch.n_samples)  # (B, T, F), (B,)
        draws1, draws2 = batch.draws.chunk(2, dim=1)
        view1 = AUGMENT(features, n_frames, draws1) if args.augment == "both" else features
        view2 = AUGMENT(features, n_frames, draws2)
        with runtime.autocast(args.precision, world.device):
            z, reversed_z = model(torch.cat([view1, view2]), n_frames.repeat(2))  # (2B, P)
        z1, z2 = map(runtime.gather, z.float().chunk(2))
        nce = losses.info_nce(z1, z2, args.temperature)
        loss, parts = nce, {"nce": nce, "nce_acc": losses.contrastive_accuracy(z1, z2)}
        for column, (label, z_rev) in enumerate(zip(labels, reversed_z)):
            r1, r2 = map(runtime.gather, z_rev.float().chunk(2))
            y = runtime.gather(batch.labels[:, column])
            fsc = losses.sup_con(
                r1, r2, y, args.fsc_temperature,
                normalize=not args.no_fsc_normalize, own_view=args.fsc_positives == "all",
            )  # fmt: skip
            loss = loss + args.balance_param * fsc / len(labels)
            accuracy, chance, alone = losses.group_separation(r1, r2, y)
            parts |= {f"fsc_{label}": fsc, f"adv_acc_{label}": accuracy}
            parts |= {f"adv_chance_{label}": chance, f"alone_{label}": alone}
        return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}}

    @torch.no_grad()
    def watch_dev():
        """Means over the dev set, in eval mode and with the masks of epoch 0 each time."""
        model.eval()
        stream = data.stream(
            dev_set, dev_batches, 0, len(dev_batches), world.rank, world.size, args.num_workers
        )
        seen = [compute(batch.to(world.device))[1] for batch in stream]
        model.train()
        return {f"dev_{k}": torch.stack([one[k] for one in seen]).mean().item() for k in seen[0]}

    # ---- what will happen
    hours = sum(u.seconds for u in utterances) / 3600
    aim = f"hiding {values}" if values else "plain SimCLR"
    origin = args.init if initial else f"scratch, size {args.size}"
    if args.size == "small":
        origin += " (the original: --init nvidia/stt_en_conformer_ctc_small)"
    world.say(
        f"stage 1: {args.manifest}{' (SYNTHETIC)' if synthetic else ''}, "
        f"{len(utterances):,} utterances, {hours:.2f} h; {aim}\n"
        f"  encoder {sum(p.numel() for p in model.encoder.parameters()):,} parameters from "
        f"{origin}; {last} steps, "
        f"{world.size} process(es) on {world.device.type}, {args.precision}"
    )
    world.say("  " + " ".join(f"{k}={v}" for k, v in vars(args).items()))
    result = out / "pretrained.pt"
    init_flag = "" if args.out == "runs/pretrain" else f" --init {shlex.quote(str(result))}"
    finish = f"stage 1 done: {result}\nnext: python finetune.py{init_flag}"
    if first >= last and result.exists():
        world.say(f"  finished before, at step {first}\n{finish}")
        return 0
    if state:
        checkpoint.restore(state, model=model, optimizer=optimizer, scaler=scaler)
        world.say(f"  going on from step {first}")
    if world.main:
        checkpoint.start(out, record)
        result.unlink(missing_ok=True)  # of the same run with a smaller --max_steps
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
                "log_size": size,
            })  # fmt: skip

    # ---- the loop
    accum, buffers = args.grad_accum, list(model.encoder.buffers())  # of its BatchNorms
    stream = data.stream(
        train_set, batches, first * accum, last * accum,
        world.rank, world.size, args.num_workers, world.device.type == "cuda",
    )  # fmt: skip
    bar = runtime.Progress("stage 1", first, last, world)
    for step in range(first, last):
        lr = runtime.lr_at(step, steps, args.lr, args.warmup, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        runtime.seed_everything(args.seed, step + 1, world.rank)  # dropout
        before = [b.clone() for b in buffers]  # put back if the step is skipped
        seen, held = {}, []  # losses, indices of utterances
        for _ in range(accum):
            batch = next(stream)
            held += batch.index
            bar.heard(batch.n_samples)
            loss, parts = compute(batch.to(world.device))
            scaler.scale(loss / accum).backward()
            seen = {k: seen.get(k, 0) + part / accum for k, part in parts.items()}
        norm, done = runtime.update(weights, optimizer, scaler, buffers, before, args.grad_clip)
        meter.add({**seen, "grad_norm": norm}, done)

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
            # all views alike: nothing pulls them apart again (all told apart is no collapse)
            if 0 < means["grad_norm"] < 1e-5 and means["nce_acc"] < 1:
                raise runtime.UserError(
                    f"by step {n} the encoder has collapsed: the gradient's norm is "
                    f"{means['grad_norm']:.1g}. Try a lower --lr (in another --out)"
                )
        if ended and dev_set:
            dev = watch_dev()
            log.write(n, epoch=epoch, **dev)
            bar.line(f"epoch {epoch}/{args.epochs}: {runtime.rounded(dev)}")
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
    bar.close()

    # ---- the result
    if world.main:
        keep = ("encoder.", "log_mel.")
        own = {k: w for k, w in model.state_dict().items() if k.startswith(keep)}
        checkpoint.save_model(
            result, "encoder", config, {**own, **carried},
            initial["tokenizer"] if initial else None, record,
            stage=1, step=max(first, last), labels=values, synthetic=synthetic,
            commit=runtime.commit(),
        )  # fmt: skip
    world.say(finish)
    return 0


if __name__ == "__main__":
    runtime.run(main, (data.ManifestError, AudioError, checkpoint.CheckpointError))
