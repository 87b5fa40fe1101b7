"""Text for calibration and evaluation, and the token windows cut from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from rotexport.checkpoint import Checkpoint
from rotexport.errors import RotexportError
from rotexport.recipe import CALIBRATION_WINDOWS

Windows: TypeAlias = npt.NDArray[np.int64]

SAMPLE_LENGTH = 512  # tokens per window, or the model's context where that is shorter
PERPLEXITY_WINDOWS = 2
PROSE = "English prose from the documentation that comes with Python"

_SENTENCES = re.compile(r"[A-Z].*[.:!?]", re.DOTALL)
_MARKUP = re.compile(r"\*\*|``|(?<!\w)\*|\*(?!\w)")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        RotexportError: there is no such file, it is empty, or it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RotexportError(
            f"text file {path} is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise RotexportError(f"text file {path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise RotexportError(f"text file {path} is empty; give some kilobytes of text")
    return text


def default_text() -> str:
    """Return English prose that every Python installation has: the paragraphs of its language reference.

    Grammar, tables, headings and examples are left out. About a quarter of a megabyte, varying a bit with the
    Python version, so figures to be compared should be measured on a named text instead.
    """
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            prose = " ".join(_MARKUP.sub("", block).split())
            if _is_prose(prose):
                paragraphs.append(prose)
    return "\n\n".join(dict.fromkeys(paragraphs))


def _is_prose(paragraph: str) -> bool:
    code = any(mark in paragraph for mark in ("::=", ">>>", "+---", "|  |", " = "))
    return not code and len(paragraph.split()) >= 8 and bool(_SENTENCES.fullmatch(paragraph))


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int | None = None
) -> Windows:
    """Cut the tokens of `text` into consecutive windows.

    The whole text is tokenized once, with the special tokens that the tokenizer itself adds.

    Args:
        tokenizer: the model's.
        text: the text.
        length: tokens per window.
        count: how many windows; None for as many as are full.

    Returns:
        Token ids [windows, length].

    Raises:
        RotexportError: the text is too short.
    """
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    wanted = 1 if count is None else count
    if ids.size < wanted * length:
        raise RotexportError(
            f"the text has {ids.size} tokens, but {wanted} x {length} = {wanted * length} are needed; "
            "give a longer text, or fewer or shorter windows"
        )
    windows = ids.size // length if count is None else count
    return ids[: windows * length].reshape(windows, length)


def spread(windows: Windows, count: int) -> Windows:
    """Return `count` of some windows [W, L], evenly spread over them, or all where there are no more."""
    chosen: Windows = windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]
    return chosen


def random_windows(vocabulary: int, length: int, count: int, seed: int = 0) -> Windows:
    """Return uniformly random token ids [count, length], for models without a tokenizer."""
    return np.random.default_rng(seed).integers(0, vocabulary, (count, length), dtype=np.int64)


@dataclass(frozen=True)
class Samples:
    """The token ids that a build looks at; no token serves two purposes.

    `tokens` [S] validate every pass, `windows` [W, L] give perplexities, `calibration` [C, L] sets scales.
    """

    tokens: npt.NDArray[np.int64]
    windows: Windows
    calibration: Windows
    source: str

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, calibration: Path | None = None, count: int = CALIBRATION_WINDOWS
    ) -> Samples:
        """Cut them from Python's own prose, with `count` calibration windows from a text file if given.

        Those are spread evenly over the file: neighbours speak of the same things.

        A model without a tokenizer gets random tokens.

        Raises:
            RotexportError: the calibration text is too short or unreadable, or there is no tokenizer for it.
        """
        length = min(SAMPLE_LENGTH, getattr(checkpoint.config, "max_position_embeddings", SAMPLE_LENGTH))
        proof = 1 + PERPLEXITY_WINDOWS
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            if calibration is not None:
                raise RotexportError(f"the model has no tokenizer to read '{calibration}' with; leave it out")
            windows = random_windows(checkpoint.config.vocab_size, length, proof + count)
            return cls(windows[0], windows[1:proof], windows[proof:], "random tokens")
        windows = token_windows(tokenizer, default_text(), length)[: proof + count]
        seen, source = windows[proof:], PROSE
        if calibration is not None:
            seen = token_windows(tokenizer, read_text(calibration), length)
            seen = spread(seen, count)
            source = f"{PROSE}; calibrated on {calibration.name}"
        return cls(windows[0], windows[1:proof], seen, source)

    def within(self, reach: int) -> Samples:
        """Return the same with at most `reach` tokens of each proof: what a bounded cache holds whole.

        Raises:
            RotexportError: nothing can be predicted within so few.
        """
        if reach < 2:
            raise RotexportError(
                f"a cache of {reach} tokens sees too little to be compared with PyTorch; "
                "widen attention.window, or pass --no-validate"
            )
        return replace(self, tokens=self.tokens[:reach], windows=self.windows[:, :reach])

    def proving_on(self, checkpoint: Checkpoint, text: Path) -> Samples:
        """Return the same with tokens and windows from a text file.

        Raises:
            RotexportError: the text is too short or unreadable, or there is no tokenizer for it.
        """
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise RotexportError(f"the model has no tokenizer to read '{text}' with; leave it out")
        count = 1 + PERPLEXITY_WINDOWS
        windows = token_windows(tokenizer, read_text(text), self.tokens.size, count)
        return replace(self, tokens=windows[0], windows=windows[1:], source=text.name)
