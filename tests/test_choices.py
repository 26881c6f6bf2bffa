"""Text that arrives token by token: whole characters, up to a stop string."""

from __future__ import annotations

import pathlib

import pytest

from qjax.serving.choices import ChoiceText
from qjax.tokenizer import Tokenizer
from tests.serving_model import write_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: pathlib.Path = write_model(tmp_path_factory.mktemp("model"))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "text", ["caf\u00e9 \U0001f642\U0001f680 \u6f22\u5b57", "plain", "a\ufffdb"]
)
@pytest.mark.parametrize("size", [1, 3, 99])
def test_streamed_text_has_whole_characters_only(tokenizer, text, size):
    ids = tokenizer.encode(text)  # most characters are several tokens of one byte each
    choice, pieces = ChoiceText(tokenizer.stream()), []
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        pieces.append(choice.push(ids[start : start + size], "length" if last else None))
    assert "".join(pieces) == text and choice.tokens == len(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    # Cut inside a character: what is left of it comes at the end only.
    choice = ChoiceText(tokenizer.stream())
    cut = tokenizer.encode("ab\U0001f642")[:-1]
    assert choice.push(cut, None) == "ab" and choice.push([], "length") == "\ufffd"


def test_stop_strings_are_found_across_tokens_and_held_back(tokenizer):
    ids = tokenizer.encode("one, two; then")
    for stops, want in (
        (("two",), "one, "),
        (("wo; t", "two; x"), "one, t"),
        (("o;", "two;"), "one, "),  # the one that begins first
        (("e, t", "n"), "o"),
        (("thens",), "one, two; then"),
        (("\U0001f642",), "one, two; then"),
    ):
        choice = ChoiceText(tokenizer.stream(), stops)
        text = ""
        for i, token in enumerate(ids):
            text += choice.push([token], "length" if i == len(ids) - 1 else None)
            assert want.startswith(text)
            if choice.finish_reason:
                break
        assert text == want and choice.finish_reason == ("length" if want[-1] == "n" else "stop")
