"""Calibration text and the windows cut from it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rotexport.errors import RotexportError
from rotexport.texts import Samples, default_text, random_windows, read_text, spread, token_windows


class Letters:
    """A tokenizer whose tokens are the letters, with a start token in front."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0, *(ord(letter) - ord("a") + 1 for letter in text)]}


def test_windows_are_consecutive_and_special_tokens_occur_once():
    windows = token_windows(Letters(), "abcdefgh", 3, 2)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows, [[0, 1, 2], [3, 4, 5]])


def test_as_many_windows_as_are_full():
    assert token_windows(Letters(), "abcdefgh", 3).shape == (3, 3)
    assert token_windows(Letters(), "abcdefg", 3).shape == (2, 3)


@pytest.mark.parametrize(("count", "needed"), [(3, "3 x 4 = 12"), (None, "1 x 4 = 4")])
def test_a_text_that_is_too_short(count, needed):
    with pytest.raises(RotexportError, match=f"the text has 3 tokens, but {needed} are needed"):
        token_windows(Letters(), "ab", 4, count)


def test_random_windows_are_reproducible_and_within_the_vocabulary():
    windows = random_windows(7, 50, 4, seed=1)
    assert windows.shape == (4, 50)
    assert set(windows.flat) == set(range(7))
    np.testing.assert_array_equal(windows, random_windows(7, 50, 4, seed=1))
    assert not np.array_equal(windows, random_windows(7, 50, 4, seed=2))


def test_the_default_text_is_prose():
    paragraphs = default_text().split("\n\n")
    assert len(default_text()) > 100_000
    assert len(paragraphs) == len(set(paragraphs))
    for paragraph in paragraphs:
        assert paragraph[0].isupper()
        assert paragraph[-1] in ".:!?"
        assert not any(mark in paragraph for mark in (">>>", "::=", "**", "\n"))


def test_reading_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Ünïcode stays.\n", encoding="utf-8")
    assert read_text(path) == "Ünïcode stays.\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"caf\xe9", "is not UTF-8"), (None, "cannot be read: No such file")],
)
def test_a_text_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RotexportError, match=message):
        read_text(path)


def test_a_bounded_cache_is_proved_on_what_it_holds():
    windows = random_windows(7, 10, 4)
    samples = Samples(windows[0], windows[1:3], windows[3:], "random tokens")
    within = samples.within(6)
    assert (within.tokens.size, within.windows.shape, within.calibration.shape) == (6, (2, 6), (1, 10))
    assert samples.within(20).tokens.size == 10
    with pytest.raises(RotexportError, match="cache of 1 tokens"):
        samples.within(1)


def test_calibration_is_spread_over_its_file(tmp_path: Path) -> None:
    checkpoint = _Numbers()
    file = tmp_path / "counting.txt"
    file.write_text(" ".join(str(number) for number in range(5120)))
    samples = Samples.of(checkpoint, file, count=4)
    assert samples.calibration[:, 0].tolist() == [0, 3 * 512, 6 * 512, 9 * 512]
    assert Samples.of(checkpoint, file, count=99).calibration.shape == (10, 512)
    assert spread(samples.calibration, 2)[:, 0].tolist() == [0, 9 * 512]


class _Numbers:
    """A checkpoint whose tokenizer reads numbers; every other word is token 0."""

    config = SimpleNamespace(max_position_embeddings=4096, vocab_size=6000)

    def tokenizer(self):
        return lambda text, verbose: {"input_ids": [int(w) if w.isdigit() else 0 for w in text.split()]}
