"""Text in, text out: prompts through a tokenizer, replies as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from rotexport.runtime.sampling import GREEDY, Sampling
from rotexport.runtime.session import Session

UNFINISHED = "�"  # what decoders write for bytes that do not make a character yet


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True)
class Request:
    """What to ask of a model; `chat` puts the prompt into the model's own chat template."""

    prompt: str
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    chat: bool = False
    stop: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class Statistics:
    """How a reply went; `interrupted` tells that Ctrl-C ended it."""

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds_per_token: float
    cache_bytes: int
    interrupted: bool

    @property
    def text(self) -> str:
        """The figures in one line."""
        pace = f", {1e3 * self.seconds_per_token:.1f} ms per token" if self.new_tokens > 1 else ""
        return (
            f"{self.prompt_tokens} prompt tokens in {self.prompt_seconds:.2f} s; "
            f"{self.new_tokens} new tokens{pace}; cache {self.cache_bytes / 1e6:.1f} MB"
        )


def reply(
    session: Session, tokenizer: Tokenizer, request: Request, emit: Callable[[str], None]
) -> Statistics:
    """Generate a reply, handing text to `emit` as soon as it is whole characters.

    Ctrl-C ends the reply; the session stays usable.
    """
    prompt = encode(tokenizer, request)
    stop = request.stop or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    start = time.perf_counter()
    times: list[float] = []
    interrupted = False

    def timed() -> Iterator[int]:
        for token in session.generate(prompt, request.max_new_tokens, request.sampling, stop):
            times.append(time.perf_counter())
            yield token

    try:
        for text in decoded(tokenizer, timed()):
            emit(text)
    except KeyboardInterrupt:
        interrupted = True
    first = times[0] if times else time.perf_counter()
    pace = (times[-1] - first) / (len(times) - 1) if len(times) > 1 else 0.0
    return Statistics(len(prompt), len(times), first - start, pace, session.cache_bytes, interrupted)


def encode(tokenizer: Tokenizer, request: Request) -> list[int]:
    """Return the prompt's tokens."""
    if not request.chat:
        return tokenizer.encode(request.prompt)
    messages = [{"role": "user", "content": request.prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they come; characters that span tokens wait for their last one."""
    ids: list[int] = []
    shown = before = 0  # ids[before:shown] is context that was shown; decoders join words by it
    for token in tokens:
        ids.append(token)
        context = tokenizer.decode(ids[before:shown], skip_special_tokens=True)
        text = tokenizer.decode(ids[before:], skip_special_tokens=True)
        if len(text) > len(context) and not text.endswith(UNFINISHED):
            yield text[len(context) :]
            before, shown = shown, len(ids)
