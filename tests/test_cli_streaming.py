"""The command line of streaming: a bounded build, text from it, and perplexity along a stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_model
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from rotexport.cli import main
from rotexport.recipe import load_recipe
from rotexport.report import read_report
from rotexport.runtime.session import Session

LETTERS = {chr(code + 32): code for code in range(95)}  # the printable characters, one token each
TEXT = "The quick brown fox jumps over the lazy dog. " * 60  # samples need 3 windows of the context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    letters = Tokenizer(WordLevel(LETTERS, unk_token=" "))
    letters.pre_tokenizer = Split(Regex(""), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("builds") / "out"
    settings = ["attention.kind=streaming", "attention.sinks=2", "attention.window=20"]
    arguments = [f"--set={setting}" for setting in settings]
    assert main(["build", str(model), "-o", str(out), "--dtype", "fp32", "-q", *arguments]) == 0
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "fox.txt").write_text(TEXT)
    return tmp_path / "fox.txt"


def test_the_build_is_proved_where_it_sees_what_pytorch_sees(built: Path) -> None:
    report = read_report(built)
    assert report.proof is not None
    assert report.proof.comparison.tokens == 22
    assert report.proof.comparison.relative_error < 1e-5
    manifest = json.loads((built / "rotexport.json").read_text())
    assert manifest["cache_bytes"] == Session(built, threads=1).cache_bytes == 2 * 2 * 8 * 22 * 2 * 4
    assert [port["name"] for port in manifest["inputs"]][:4] == [
        "input_ids",
        "logit_index",
        "past_length",
        "new_length",
    ]


def test_run_prints_the_sessions_tokens(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(built), "over the", "--max-new-tokens", "30", "--stats"]) == 0
    printed = capsys.readouterr()
    prompt = [LETTERS[letter] for letter in "over the"]
    tokens = list(Session(built, threads=1).generate(prompt, 30))
    known = [token for token in tokens if token < 95]
    assert printed.out.replace(" ", "").strip() == "".join(chr(t + 32) for t in known).replace(" ", "")
    assert "8 prompt tokens" in printed.err
    assert "30 new tokens" in printed.err


def test_the_seed_decides_what_is_drawn(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for seed in ("1", "1", "2"):
        assert main(["run", str(built), "fox", "--temperature", "3", "--seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_eval_stream_compares_and_draws(built: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(built), "--text", str(text), "--stream", "--tokens", "100", "--bucket", "25"]
    assert main([*arguments, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [bucket["start"] for bucket in found["buckets"]] == [1, 26, 51, 76]
    assert found["tokens"] == found["window_only"]["tokens"] == found["dense"]["tokens"] == 99
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    stored = read_report(built).stream
    assert stored is not None
    assert stored.stream.perplexity == found["perplexity"]
    page = (built / "report.html").read_text()
    assert "Along a stream" in page
    assert "99 tokens of fox.txt" in page


def test_options_that_would_be_ignored_are_refused(
    built: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--tokens", "5"], "--tokens needs --stream"),
        (["--stream", "--windows", "2"], "--windows does not go with --stream"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(built), "--text", str(text), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_what_cannot_stream_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tmp_path / "dense"
    assert main(["build", str(model), "-o", str(dense), "--no-validate", "-q"]) == 0
    assert main(["eval", str(dense), "--text", str(text), "--stream", "-q"]) == 1
    assert "is dense" in capsys.readouterr().err
    assert main(["run", str(dense), "x" * 70]) == 1
    assert "attention.kind: streaming" in capsys.readouterr().err
    assert main(["run", str(dense), "x", "--on", "engine"]) == 1
    assert "has no engines" in capsys.readouterr().err
    assert main(["run", str(dense), "x", "--plugins", "a.so"]) == 1
    assert "leave out --plugins a.so" in capsys.readouterr().err
    window = ["--set=attention.kind=streaming", "--set=attention.window=0"]
    assert main(["build", str(model), "-o", str(tmp_path / "no"), "-q", *window]) == 1
    assert "attention.window: 0" in capsys.readouterr().err
    opt = tmp_path / "opt"
    tiny_model("opt").save_pretrained(opt)
    assert main(["build", str(opt), "-o", str(tmp_path / "no"), "-q", "--set=attention.kind=streaming"]) == 1
    assert "learned positions" in capsys.readouterr().err


def test_eviction_takes_its_context_from_the_model(model: Path, tmp_path: Path) -> None:
    settings = ["attention.kind=streaming", "attention.window=20", "attention.eviction.recent=4"]
    policy = ["attention.eviction.policy=heavy-hitter"]
    for name, own, context in (("stated", [], 64), ("explicit", ["attention.eviction.context=32"], 32)):
        out = tmp_path / name
        asked = [f"--set={setting}" for setting in (*settings, *policy, *own)]
        assert main(["build", str(model), "-o", str(out), "--no-validate", "-q", *asked]) == 0
        assert load_recipe(str(out / "recipe.yaml")).attention.eviction.context == context
        said = [note for note in read_report(out).notes if note.startswith("attention.eviction.context: 64")]
        assert bool(said) == (name == "stated")


def test_validate_repeats_the_proof_of_a_streaming_build(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(built), "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"] < 1e-5
