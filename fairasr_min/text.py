"""Text: normalisation, subword units, and what CTC makes of them. No torch here.

V is the number of units; the CTC blank is class V, the last one.
"""

import io
import re
import unicodedata
from collections.abc import Callable

import sentencepiece

NORMALIZATION = "basic-1"  # recorded in model files and reports; change it with the function
CHARACTERS_BELOW = 100  # words of training text per unit under which units are single characters

_APOSTROPHES = str.maketrans({c: "'" for c in "\u2018\u2019\u02bc\u0060\u00b4\uff07"})

_INVISIBLE = {"\u034f", "\u180b", "\u180c", "\u180d", "\u180f"}  # marks that show nothing
_INVISIBLE |= {chr(c) for c in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))}  # variants


def normalize(text: str) -> str:
    """The `basic` normalisation: one spelling for what sounds the same, nothing language-specific.

    Unicode NFKC, lower case, typographic apostrophes to ', invisible format characters removed,
    every other punctuation mark or symbol to a space, runs of spaces to one. Letters, accents and
    digits of any script stay; an apostrophe stays inside or at the edge of a word.
    """
    text = text.translate(_APOSTROPHES)  # before NFKC, which splits the acute accent
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).lower()
    kept = [" "]
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)
        if category == "Cf" or char in _INVISIBLE:  # dropped without a gap
            continue
        if category[0] == "M" and kept[-1] in " '":  # an accent on nothing
            continue
        kept.append(char if char == "'" or category[0] in "LMN" else " ")
    words = unicodedata.normalize("NFC", "".join(kept)).split()
    return " ".join(word for word in words if word.strip("'"))


def printable(text: str) -> str:
    """One line that a terminal does not obey: control characters of the data become "?"."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def normalizer(name: str) -> tuple[Callable[[str], str], str]:
    """The function of that name, and what to write down of it.

    none: texts as they are. basic: normalize(). whisper: the English normalisation of Radford et
    al. 2022 (numbers, spellings, contractions), from the package whisper-normalizer. Raises
    ValueError if that is not installed.
    """
    if name == "none":
        return str.strip, "none"
    if name == "basic":
        return normalize, NORMALIZATION
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise ValueError("--normalize whisper needs: pip install whisper-normalizer") from None
    return EnglishTextNormalizer(), "whisper (English)"


class Tokenizer:
    """Sentencepiece units. `model` is the serialised model: plain bytes, safe to store and load."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def __len__(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    @property
    def unknown(self) -> int:
        """The id of whatever has no unit."""
        return self._processor.unk_id()

    def decode(self, ids: list[int]) -> str:
        """Text of the units, as sentencepiece writes it: what is unknown is \u2047."""
        return self._processor.decode(ids)

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(len(self))]


def train_tokenizer(texts: list[str], vocab_size: int) -> tuple[Tokenizer, str]:
    """Units for normalised texts, and one sentence that says which.

    A unigram model (Kudo, ACL 2018) of at most `vocab_size` units; single characters where the
    text has under 100 words a unit, since rarer units than that are not learned from it.
    Raises ValueError if there is no text.
    """
    n_words = sum(len(re.findall(r"\S+", text)) for text in texts)
    if n_words == 0:
        raise ValueError("there is no text to make units from")
    alphabet = len(set("".join(texts)))
    characters = n_words < CHARACTERS_BELOW * vocab_size or alphabet + 2 > vocab_size
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type="char" if characters else "unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        use_all_vocab=characters,
        character_coverage=1.0,
        max_sentence_length=1 << 30,  # bytes; a longer text would be left out
        normalization_rule_name="identity",  # normalize() has done it
        add_dummy_prefix=not characters,  # a leading space costs characters a frame
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = Tokenizer(file.getvalue())
    if characters:
        why = f"{len(tokenizer)} characters: {n_words:,} words are too few for {vocab_size} units"
    else:
        why = f"{len(tokenizer)} sentencepiece units from {n_words:,} words"
    return tokenizer, why


def ctc_collapse(ids: list[int], blank: int) -> list[int]:
    """Best class of each frame -> units: repeats merged, then blanks removed (Graves 2006)."""
    return [i for i, before in zip(ids, [None, *ids[:-1]]) if i != before and i != blank]


def ctc_min_frames(target: list[int]) -> int:
    """Frames that CTC needs at least: one a unit, one more blank between equal neighbours."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))
