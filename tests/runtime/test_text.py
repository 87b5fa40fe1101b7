"""Replies as text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rotexport.runtime.session import Session
from rotexport.runtime.text import Request, decoded, encode, reply


class Bytes:
    """Tokens are bytes: a character may take several; the tiny model knows those up to 95."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"<{messages[0]['role']}>{messages[0]['content']}"


def test_characters_of_several_tokens_come_whole() -> None:
    assert list(decoded(Bytes(), "aé€b".encode())) == ["a", "é", "€", "b"]


def test_chat_prompts_go_through_the_template() -> None:
    assert encode(Bytes(), Request("hi", chat=True)) == list(b"<user>hi")
    assert encode(Bytes(), Request("hi")) == list(b"hi")


def test_a_reply_is_the_sessions_tokens(streaming_model: Path) -> None:
    session = Session(streaming_model, threads=1)
    texts: list[str] = []
    statistics = reply(session, Bytes(), Request("IS IT? IT IS", max_new_tokens=9), texts.append)
    session.reset()
    expected = bytes(session.generate(list(b"IS IT? IT IS"), 9)).decode(errors="replace")
    assert expected.startswith("".join(texts))
    assert (statistics.prompt_tokens, statistics.new_tokens, statistics.interrupted) == (12, 9, False)
    assert statistics.seconds_per_token > 0


def test_ctrl_c_ends_a_reply_and_the_session_goes_on(streaming_model: Path) -> None:
    session = Session(streaming_model, threads=1)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    statistics = reply(session, Bytes(), Request("IS IT?", max_new_tokens=50), interrupt)
    assert statistics.interrupted
    assert statistics.new_tokens < 50
    assert np.isfinite(session.step(7)).all()


@pytest.mark.parametrize("stop", [1, 3])
def test_stop_tokens_end_a_reply(streaming_model: Path, stop: int) -> None:
    session = Session(streaming_model, threads=1)
    tokens = list(session.generate(list(b"GO ON"), 8))
    first = tokens.index(tokens[stop])
    session.reset()
    request = Request("GO ON", max_new_tokens=8, stop=(tokens[stop],))
    assert reply(session, Bytes(), request, lambda _: None).new_tokens == first
