"""NVIDIA's .nemo archives of Conformer-CTC and FastConformer-CTC, read and written without NeMo.

An archive is a tar file: model_config.yaml, model_weights.ckpt (a PyTorch file of tensors), and a
sentencepiece model. Everything in it is hostile until checked: it is read into memory and nothing
of it is unpacked to a path; weights are loaded with weights_only=True, YAML by the safe loader; and
sizes are compared with one another before the memory that they ask for is taken.
An option that we do not carry and that changes what encoder, front end or CTC head compute is
refused by name and value, never ignored. How an archive decodes is not looked at.
"""

import gzip
import hashlib
import inspect
import io
import math
import os
import pickletools
import tarfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import torch
import yaml

from fairasr_min.audio import N_FFT, SAMPLE_RATE, WINDOW, LogMel
from fairasr_min.conformer import Conformer, ConformerConfig
from fairasr_min.model import ConformerCTC
from fairasr_min.text import Tokenizer

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
PIECE = 2**20  # bytes read at once; no header of a tar file is longer
SMALL = 2**22  # bytes: the largest configuration, tokenizer, or index of the weights
MEMBERS = 1000
UNPACKED = 20  # bytes out of a byte of gzip; trained weights hardly shrink, a bomb gives 1,000
DEPTH = 30  # of lists in lists in the configuration
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, faster

# What a file of tensors needs, out of the little more that weights_only=True would still allow
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
GLOBALS |= {"torch._utils _rebuild_parameter"}
GLOBALS |= {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long")}

# Their names for what is not in the encoder, whose names are the same
FRONT = "preprocessor.featurizer."
HEAD = "decoder.decoder_layers.0."
SPARE = {"encoder.pos_enc.pe"}  # a table of sinusoids which older versions stored


class NemoError(ValueError):
    """An archive that cannot be read, used or written; says which, why, and what to do."""


def load_nemo(path: str | Path) -> ConformerCTC:
    """The recogniser of an archive, ready to transcribe (eval mode, CPU). Raises NemoError."""
    content = read_nemo(path)
    model = ConformerCTC(content["config"], Tokenizer(content["tokenizer"]))
    model.load_state_dict(content["weights"])
    return model.eval()


def read_nemo(path: str | Path) -> dict:
    """What an archive holds, all of it checked against one another: "config" (ConformerConfig),
    "weights" (of a ConformerCTC, by our names), "tokenizer" (the sentencepiece model, as bytes) and
    "set_aside" (settings for training in NeMo that our scripts do not take over, as text).

    Takes at most about twice the memory of the weights. Raises NemoError.
    """
    with one_line_errors(path), open(path, "rb") as file:
        archive = Archive(file)
        config, name, n_units, set_aside = read_config(archive.read(CONFIG, SMALL).getvalue())
        tokenizer = archive.read(name, SMALL).getvalue()
        size = read_tokenizer(name, tokenizer)
        if n_units > 0 and n_units != size:
            raise NemoError(f"decoder.num_classes is {n_units}, but {name} has {size} units")
        weights = read_weights(archive.read(WEIGHTS), config, size)
    return {
        "config": config,
        "weights": weights,
        "tokenizer": tokenizer,
        "set_aside": set_aside,
    }


def check_whole(path: str | Path) -> None:
    """Raises NemoError unless the archive is there to its end; looks at no options."""
    with one_line_errors(path), open(path, "rb") as file:
        archive = Archive(file)
        archive.read(CONFIG, SMALL)
        check_zip(archive.read(WEIGHTS))


@contextmanager
def one_line_errors(path: str | Path):
    """Whatever goes wrong with this file inside becomes a NemoError."""
    try:
        yield
    except NemoError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # tarfile, gzip, zipfile, yaml and torch raise what bytes lead to
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        reason = f"damaged, or not a .nemo archive ({reason})"
    else:
        return
    # names in the archive may hold anything, also what a terminal obeys
    printable = "".join(c if c.isprintable() else "?" for c in reason)
    raise NemoError(f"{path}: {printable[:1000]}")


# ---- the tar file --------------------------------------------------------------------------------


class Archive:
    """The members of a tar file, gzipped or not, by name."""

    def __init__(self, file):
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        limit = max(UNPACKED * size, SMALL) if zipped else size
        self.file = BoundedFile(gzip.GzipFile(fileobj=file) if zipped else file, limit)
        self.members = {}
        with tarfile.open(fileobj=self.file, mode="r:") as tar:
            for count, member in enumerate(tar):
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise NemoError(f"a member's path leads out of the archive: {member.name!r}")
                if not (member.isfile() or member.isdir()) or member.issparse():
                    raise NemoError(f"member {member.name!r} is neither a file nor a folder")
                if str(name) in self.members or count > MEMBERS:
                    raise NemoError(f"member {member.name!r} is there twice, or there are too many")
                self.members[str(name)] = member

    def read(self, name: str, most: int | None = None) -> io.BytesIO:
        """What is in a member of at most so many bytes."""
        member = self.members.get(name)
        if member is None or not member.isfile():
            raise NemoError(f"{name} is missing; is it a whole .nemo archive?")
        if most is not None and member.size > most:
            raise NemoError(f"{name} is {member.size:,} bytes long; at most {most:,} make sense")
        self.file.seek(member.offset_data)
        content = io.BytesIO()
        while left := member.size - content.tell():
            piece = self.file.read(min(left, PIECE))
            if not piece:
                raise NemoError(f"{name} ends early; the file is truncated")
            content.write(piece)
        content.seek(0)
        return content


class BoundedFile:
    """A file for tarfile to read, which neither unpacks a bomb nor reads a header of gigabytes."""

    def __init__(self, file, limit: int):
        self.file, self.limit, self.tell = file, limit, file.tell

    def seek(self, position: int) -> int:
        if position > self.limit:
            raise NemoError(
                f"claims to hold {position:,} bytes where {self.limit:,} at most are plausible: "
                "truncated, or a decompression bomb"
            )
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        if size > PIECE:
            raise NemoError(f"a header of {size:,} bytes: damaged, or made to fill the memory")
        self.seek(self.tell())  # which stops at the limit
        return self.file.read(size)


# ---- the configuration ---------------------------------------------------------------------------


class Section:
    """A section of model_config.yaml, each of whose keys is taken once. What we do not carry, and
    what nobody took, ends up in `refused`; what matters to NeMo's training alone in `set_aside`."""

    def __init__(self, config: dict, name: str, refused: list[str], set_aside: list[str]):
        if not isinstance(config.get(name), dict):
            raise NemoError(f"{CONFIG} has no section {name!r}")
        self.name, self.left = name, dict(config[name])
        self.refused, self.set_aside = refused, set_aside

    def refuse(self, key: str, value, carried: str) -> None:
        self.refused.append(f"{self.name}.{key} {str(value)[:80]!r} (carried: {carried})")

    def choice(self, key: str, default, *carried):
        value = self.left.pop(key, default)
        if value in carried:
            return value
        self.refuse(key, value, ", ".join(map(str, carried)))
        return carried[0]

    def number(self, key: str, default, low: float, high: float = math.inf, kind: type = int):
        """A finite number from low to high; null is the default. PyYAML takes 1e-05 for text."""
        value = self.left.pop(key, None)
        try:
            number = float(default if value is None else value)
            if low <= number <= high and math.isfinite(number) and number == kind(number):
                return kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
        self.refuse(key, value, f"{kind.__name__} from {low:g} to {high:g}")
        return kind(default or max(low, 1))

    def class_name(self, carried: str) -> None:
        """Of the module, whose place differs between versions of NeMo."""
        value = str(self.left.pop("_target_", carried))
        if value.split(".")[-1] != carried:
            self.refuse("_target_", value, carried)

    def training_only(self, key: str, off) -> None:
        value = self.left.pop(key, off)
        if value != off:
            self.set_aside.append(f"{self.name}.{key} {str(value)[:80]}")

    def done(self, *harmless: str) -> None:
        """Refuse every key that is left, but for these and for what is null or false."""
        for key, value in self.left.items():
            if key not in harmless and value is not None and value is not False:
                self.refuse(str(key)[:80], value, "nothing of this name")


def read_yaml(text: bytes) -> dict:
    """Without aliases (a few of them make an exponential number of values; NeMo writes none)."""
    depth = 0
    for event in yaml.parse(text, YAML):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEPTH:
            raise NemoError(f"{CONFIG} has aliases, or lists in more than {DEPTH} lists")
    config = yaml.load(text, YAML)
    if not isinstance(config, dict):
        raise NemoError(f"{CONFIG} holds no settings")
    return config


def read_config(text: bytes) -> tuple[ConformerConfig, str, int, list[str]]:
    """model_config.yaml -> architecture, member with the sentencepiece model, number of units (0 or
    less: as many as that has), and the settings for training that our scripts do not take over.
    Raises NemoError with everything that we do not carry."""
    config = read_yaml(text)
    refused, set_aside = [], []
    target = str(config.get("target")).split(".")[-1]
    if target != "EncDecCTCModelBPE":  # its sections would be others
        raise NemoError(f"not supported: target {target[:80]!r} (carried: EncDecCTCModelBPE)")

    def section(name):
        return Section(config, name, refused, set_aside)

    n_mels, front_end = read_front_end(section("preprocessor"))
    encoder = read_encoder(section("encoder"), n_mels, front_end)

    s = section("tokenizer")
    s.choice("type", None, "bpe")  # which says sentencepiece, of any kind
    s.choice("custom_tokenizer", None, None)
    tokenizer = str(s.left.get("model_path") or "tokenizer.model").removeprefix("nemo:")
    if PurePosixPath(tokenizer).is_absolute():  # where it lay on the writer's machine
        tokenizer = PurePosixPath(tokenizer).name

    s = section("decoder")
    s.class_name("ConvASRDecoder")
    s.choice("feat_in", None, None, encoder.d_model)
    s.choice("add_blank", True, True)
    n_units = s.number("num_classes", -1, -1)
    s.done("vocabulary", "init_mode")

    if str(config.get("sample_rate") or SAMPLE_RATE) != str(SAMPLE_RATE):
        refused.append(f"sample_rate {config['sample_rate']!r} (carried: {SAMPLE_RATE})")
    if config.get("ctc_reduction", "mean_batch") != "mean_batch":
        set_aside.append(f"ctc_reduction {str(config['ctc_reduction'])[:80]}")
    if refused:
        raise NemoError("not supported: " + "; ".join(refused))
    return encoder, tokenizer, n_units, set_aside


def read_front_end(s: Section) -> tuple[int, dict]:
    """The number of mel bins, and what differs from the defaults of LogMel."""
    s.class_name("AudioToMelSpectrogramPreprocessor")
    s.number("sample_rate", SAMPLE_RATE, SAMPLE_RATE, SAMPLE_RATE)

    def samples(seconds: str, default: float, samples: str) -> int:
        if s.left.get(samples):
            s.left.pop(seconds, None)
            return s.number(samples, None, 1)
        return max(1, int(s.number(seconds, default, 0, 1, float) * SAMPLE_RATE))

    window = samples("window_size", 0.02, "n_window_size")
    hop = samples("window_stride", 0.01, "n_window_stride")
    n_fft = s.number("n_fft", 1 << (window - 1).bit_length(), window)
    if n_fft % 2:
        s.refuse("n_fft", n_fft, "even numbers")
    n_mels = s.number("features", 64, 1)
    low_freq = s.number("lowfreq", 0, 0, SAMPLE_RATE / 2, float)
    high_freq = s.number("highfreq", SAMPLE_RATE / 2, low_freq, SAMPLE_RATE / 2, float)
    # null means none, which the default is not
    no_emphasis = s.left.get("preemph", 0.97) is None
    if isinstance(guard := s.left.get("log_zero_guard_value"), str) and guard in ("tiny", "eps"):
        s.left["log_zero_guard_value"] = getattr(torch.finfo(torch.float32), guard)
    options = {
        "window": window,
        "hop": hop,
        "n_fft": n_fft,
        "window_type": s.choice("window", "hann", "hann", "hamming", "blackman", "bartlett"),
        "low_freq": low_freq,
        "high_freq": high_freq,
        "mel_norm": s.choice("mel_norm", "slaney", "slaney", None),
        "pre_emphasis": s.number("preemph", 0.0 if no_emphasis else 0.97, -1, 1, float),
        "mag_power": s.number("mag_power", 2.0, 0, math.inf, float),
        "log": s.choice("log", True, True, False),
        "log_guard": s.number("log_zero_guard_value", 2.0**-24, 0, math.inf, float),
        "log_guard_type": s.choice("log_zero_guard_type", "add", "add", "clamp"),
        "normalize": s.choice(
            "normalize", "per_feature", "per_feature", "all_features", "NA", None
        ),
        "pad_to": s.number("pad_to", 16, 0, 1024),
        "pad_value": s.number("pad_value", 0.0, -math.inf, math.inf, float),
    }
    if options["normalize"] in ("NA", None):
        options["normalize"] = "none"
    s.number("frame_splicing", 1, 1, 1)
    s.choice("exact_pad", False, False)
    s.training_only("dither", 0.0)
    s.training_only("nb_augmentation_prob", 0.0)
    s.done("nb_max_freq", "rng", "use_torchaudio", "stft_conv", "stft_exact_pad")
    usual = inspect.signature(LogMel).parameters
    return n_mels, {k: v for k, v in options.items() if v != usual[k].default}


def read_encoder(s: Section, n_mels: int, front_end: dict) -> ConformerConfig:
    s.class_name("ConformerEncoder")
    d_model = s.number("d_model", None, 2)
    n_heads = s.number("n_heads", 4, 1)
    if d_model % n_heads or d_model % 2:
        s.refuse("d_model", d_model, f"even multiples of n_heads {n_heads}")
    kernel = s.number("conv_kernel_size", 31, 1)
    if kernel % 2 == 0:
        s.refuse("conv_kernel_size", kernel, "odd numbers")
    factor = s.number("subsampling_factor", 4, 2)
    if factor & (factor - 1):
        s.refuse("subsampling_factor", factor, "powers of two")
    channels = s.number("subsampling_conv_channels", -1, -1)
    dropout = s.number("dropout", 0.1, 0, 1, float)
    dropout_pre_encoder = s.number("dropout_pre_encoder", 0.1, 0, 1, float)
    config = ConformerConfig(
        n_mels=s.number("feat_in", n_mels, n_mels, n_mels),
        d_model=d_model,
        n_layers=s.number("n_layers", None, 1),
        n_heads=n_heads,
        ff_expansion=s.number("ff_expansion_factor", 4, 1),
        conv_kernel=kernel,
        subsampling_channels=d_model if channels == -1 else channels,
        dropout=dropout,
        dropout_att=s.number("dropout_att", 0.0, 0, 1, float),
        subsampling_factor=factor,
        depthwise_subsampling=s.choice("subsampling", "striding", "striding", "dw_striding")
        == "dw_striding",
        xscaling=s.choice("xscaling", True, True, False),
        use_bias=s.choice("use_bias", True, True, False),
        tied_position_biases=not s.choice("untie_biases", True, True, False),
        conv_norm=s.choice("conv_norm_type", "batch_norm", "batch_norm", "layer_norm"),
        att_context=read_context(s),
        dropout_pre_encoder=None if dropout_pre_encoder == dropout else dropout_pre_encoder,
        dropout_emb=s.number("dropout_emb", 0.1, 0, 1, float),
        front_end=front_end,
    )
    s.choice("self_attention_model", "rel_pos", "rel_pos")
    s.choice("att_context_style", "regular", "regular")
    s.choice("conv_context_style", "regular", "regular")
    s.choice("conv_context_size", None, None, [kernel // 2, kernel // 2])
    s.choice("causal_downsampling", False, False)
    s.choice("reduction", None, None)
    s.choice("feat_out", -1, -1, 0, None, d_model)
    s.training_only("stochastic_depth_drop_prob", 0.0)
    s.done(
        "pos_emb_max_len", "sync_max_audio_length", "subsampling_conv_chunking_factor",
        "use_pytorch_sdpa", "use_pytorch_sdpa_backends", "reduction_position", "reduction_factor",
        "att_context_probs", "global_tokens", "global_tokens_spacing",
        "stochastic_depth_mode", "stochastic_depth_start_layer",
    )  # fmt: skip
    return config


def read_context(s: Section) -> tuple[int, int]:
    """[left, right], or several of them for training, of which the first is for inference."""
    value = s.left.pop("att_context_size", None) or [-1, -1]
    first = value[0] if isinstance(value, list) and isinstance(value[0], list) else value
    if isinstance(first, list) and len(first) == 2:
        if all(isinstance(side, int) and side >= -1 for side in first):
            return tuple(first)
    s.refuse("att_context_size", value, "[left, right], -1 for all")
    return (-1, -1)


def read_tokenizer(name: str, model: bytes) -> int:
    """Number of its units. Raises NemoError."""
    try:
        return len(Tokenizer(model))
    except RuntimeError:
        raise NemoError(f"{name} is no sentencepiece model") from None


# ---- the weights ---------------------------------------------------------------------------------


def read_weights(file: io.BytesIO, config: ConformerConfig, n_units: int) -> dict:
    """model_weights.ckpt -> weights of a ConformerCTC, by our names. Raises NemoError."""
    check_zip(file)
    claimed = torch.load(file, map_location="meta", weights_only=True)  # shapes, no memory
    check_shapes(claimed, config, n_units, file.getbuffer().nbytes)
    file.seek(0)
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    theirs = {k: w.float() if w.is_floating_point() else w for k, w in theirs.items()}
    if config.tied_position_biases:
        for name, weight in theirs.items():
            copies = f"encoder.layers.0.self_attn.{name.split('.')[-1]}"
            if "pos_bias_" in name and not torch.equal(weight, theirs[copies]):
                raise NemoError(f"{name} differs between layers, but untie_biases is false")
    return {
        "log_mel.mel": theirs[FRONT + "fb"][0],
        "log_mel.window": theirs[FRONT + "window"],
        "decoder.weight": theirs[HEAD + "weight"][:, :, 0],
        "decoder.bias": theirs[HEAD + "bias"],
        **{k: w for k, w in theirs.items() if k.startswith("encoder.") and k not in SPARE},
    }


def check_zip(file: io.BytesIO) -> None:
    """NemoError unless this is what torch.save makes of tensors, and of nothing else."""
    if not zipfile.is_zipfile(file):
        raise NemoError(f"{WEIGHTS} is damaged, or older than PyTorch 1.6; load and save it anew")
    with zipfile.ZipFile(file) as unpacked:
        entries = unpacked.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
        if not stored or sum(e.file_size for e in entries) > file.getbuffer().nbytes:
            raise NemoError(
                f"{WEIGHTS} is compressed, as PyTorch never does: a decompression bomb?"
            )
        index = [e for e in entries if e.filename.endswith("/data.pkl")]
        if len(index) != 1 or index[0].file_size > SMALL:
            raise NemoError(f"{WEIGHTS} has not one index of a plausible size")
        pickle = unpacked.read(index[0])
    file.seek(0)
    for opcode, argument, _ in pickletools.genops(pickle):  # reads, runs nothing
        if opcode.name == "STACK_GLOBAL" or opcode.name == "GLOBAL" and argument not in GLOBALS:
            named = str(argument).replace(" ", ".")[:80]
            raise NemoError(f"{WEIGHTS} would run code ({named}): it holds more than tensors")


def check_shapes(claimed: dict, config: ConformerConfig, n_units: int, n_bytes: int) -> None:
    """NemoError unless names and shapes are those of the architecture and the file can hold them.

    Only what the weights confirm is built, and that on the meta device, which takes no memory.
    """
    if not isinstance(claimed, dict) or not all(map(torch.is_tensor, claimed.values())):
        raise NemoError(f"{WEIGHTS} is no dictionary of tensors")
    # tied weights share their bytes, and are few
    if sum(w.numel() * w.element_size() for w in claimed.values()) > 2 * n_bytes:
        raise NemoError(f"{WEIGHTS} claims tensors larger than itself")
    layers = {
        str(name).split(".")[2] for name in claimed if str(name).startswith("encoder.layers.")
    }
    if config.n_layers != len(layers):
        raise NemoError(f"encoder.n_layers is {config.n_layers}, but {WEIGHTS} has {len(layers)}")
    try:
        with torch.device("meta"):
            encoder = Conformer(config)
    except RuntimeError as error:  # more bytes than 64 bits can count
        raise NemoError(f"weights do not fit {CONFIG}: {str(error).split(' with ')[0]}") from None
    window, n_fft = config.front_end.get("window", WINDOW), config.front_end.get("n_fft", N_FFT)
    expected = {f"encoder.{name}": tuple(w.shape) for name, w in encoder.state_dict().items()}
    expected |= {
        FRONT + "window": (window,),
        FRONT + "fb": (1, config.n_mels, n_fft // 2 + 1),
        HEAD + "weight": (n_units + 1, config.d_model, 1),
        HEAD + "bias": (n_units + 1,),
    }
    found = {name: tuple(w.shape) for name, w in claimed.items() if name not in SPARE}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, should be {expected.get(name, 'absent')}"
        for name in [*expected, *(found.keys() - expected.keys())]
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise NemoError(f"weights do not fit {CONFIG}: {'; '.join(wrong[:3])}{more}"[:600])


# ---- giving back ---------------------------------------------------------------------------------


def export(model: ConformerCTC, path: str | Path) -> None:
    """Write an archive that NeMo's EncDecCTCModelBPE.restore_from reads (whole or not at all).

    Raises NemoError, e.g. for a model without a tokenizer, or on a full disk.
    """
    if model.tokenizer is None:
        raise NemoError(f"{path}: not written; a model without a tokenizer is none for NeMo")
    spm, pieces = model.tokenizer.model, model.tokenizer.pieces()
    tokenizer = {  # kind of artifact: member
        "tokenizer.model": spm,
        "vocab.txt": "".join(f"{piece}\n" for piece in pieces).encode(),
        "tokenizer.vocab": "".join(f"{piece}\t0\n" for piece in pieces).encode(),
    }
    names = {kind: f"{hashlib.md5(text).hexdigest()}_{kind}" for kind, text in tokenizer.items()}
    config = yaml.safe_dump(their_config(model, names), sort_keys=False, allow_unicode=True)
    members = {names[kind]: io.BytesIO(text) for kind, text in tokenizer.items()}
    members |= {CONFIG: io.BytesIO(config.encode()), WEIGHTS: io.BytesIO()}
    torch.save(their_weights(model), members[WEIGHTS])

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for name, content in members.items():
                    member = tarfile.TarInfo(f"./{name}")
                    member.size = content.getbuffer().nbytes
                    content.seek(0)
                    tar.addfile(member, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):  # a disk that can no longer be written
            unfinished.unlink()
        raise NemoError(f"{path} could not be written ({error}); nothing was lost") from None


def their_weights(model: ConformerCTC) -> dict[str, torch.Tensor]:
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    return {
        FRONT + "window": weights["log_mel.window"],
        FRONT + "fb": weights["log_mel.mel"][None],
        **{name: w for name, w in weights.items() if name.startswith("encoder.")},
        HEAD + "weight": weights["decoder.weight"][:, :, None],
        HEAD + "bias": weights["decoder.bias"],
    }


def their_config(model: ConformerCTC, artifacts: dict[str, str]) -> dict:
    """model_config.yaml of a model: what its modules are built from, nothing about training."""
    config = model.config
    usual = {k: p.default for k, p in inspect.signature(LogMel).parameters.items()}
    front = {**usual, **config.front_end}
    modules = "nemo.collections.asr.modules."
    before = config.dropout_pre_encoder
    return {
        "target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        "sample_rate": SAMPLE_RATE,
        "ctc_reduction": "mean_batch",
        "tokenizer": {
            "dir": "",
            "type": "bpe",
            "model_path": "nemo:" + artifacts["tokenizer.model"],
            "vocab_path": "nemo:" + artifacts["vocab.txt"],
            "spe_tokenizer_vocab": "nemo:" + artifacts["tokenizer.vocab"],
        },
        "preprocessor": {
            "_target_": modules + "AudioToMelSpectrogramPreprocessor",
            "sample_rate": SAMPLE_RATE,
            "window_size": _seconds(front["window"]),
            "window_stride": _seconds(front["hop"]),
            "n_fft": front["n_fft"],
            "window": front["window_type"],
            "features": config.n_mels,
            "lowfreq": front["low_freq"],
            "highfreq": front["high_freq"],
            "mel_norm": front["mel_norm"],
            "preemph": front["pre_emphasis"],
            "mag_power": front["mag_power"],
            "log": front["log"],
            "log_zero_guard_type": front["log_guard_type"],
            "log_zero_guard_value": front["log_guard"],
            "normalize": "NA" if front["normalize"] == "none" else front["normalize"],
            "frame_splicing": 1,
            "dither": 0.0,
            "pad_to": front["pad_to"],
            "pad_value": front["pad_value"],
        },
        "encoder": {
            "_target_": modules + "ConformerEncoder",
            "feat_in": config.n_mels,
            "feat_out": -1,
            "n_layers": config.n_layers,
            "d_model": config.d_model,
            "subsampling": "dw_striding" if config.depthwise_subsampling else "striding",
            "subsampling_factor": config.subsampling_factor,
            "subsampling_conv_channels": config.subsampling_channels,
            "ff_expansion_factor": config.ff_expansion,
            "self_attention_model": "rel_pos",
            "n_heads": config.n_heads,
            "att_context_size": list(config.att_context),
            "xscaling": config.xscaling,
            "untie_biases": not config.tied_position_biases,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": config.conv_kernel,
            "conv_norm_type": config.conv_norm,
            "use_bias": config.use_bias,
            "dropout": config.dropout,
            "dropout_pre_encoder": config.dropout if before is None else before,
            "dropout_emb": config.dropout_emb,
            "dropout_att": config.dropout_att,
        },
        "decoder": {
            "_target_": modules + "ConvASRDecoder",
            "feat_in": config.d_model,
            "num_classes": model.blank,
            "vocabulary": model.tokenizer.pieces(),
        },
    }


def _seconds(samples: int) -> float:
    """So that int(seconds * 16000), which is how NeMo gets back to them, gives as many."""
    seconds = samples / SAMPLE_RATE
    return seconds if int(seconds * SAMPLE_RATE) == samples else math.nextafter(seconds, 1)
