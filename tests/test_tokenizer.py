"""Tokenizer: ids and text of real files, text arriving token by token, chat templates."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from qjax.tokenizer import Tokenizer


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Every byte is a token: characters beyond ASCII take two to four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    fast.decoder = decoders.ByteLevel()  # type: ignore
    fast.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(fast, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def llama2(shared_data: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_folder(shared_data / "tok-llama2")


def test_real_files(shared_data: pathlib.Path, llama2: Tokenizer) -> None:
    assert (llama2.bos_id, llama2.eos_id, llama2.vocab_size) == (1, 2, 32000)
    text = "Once upon a time, naïve 日本 🙂 girl.\nHi"
    ids = llama2.encode(text)
    assert ids[:6] == [1, 9038, 2501, 263, 931, 29892]
    assert llama2.encode(text, add_special_tokens=False) == ids[1:]
    assert llama2.decode(ids) == text
    assert llama2.decode(ids[:3], skip_special_tokens=False) == "<s> Once upon"
    assert llama2.token(1) == "<s>" and llama2.token(9038) == "▁Once"
    assert llama2.token(10**6) is None and llama2.chat_template is None
    small = Tokenizer.from_folder(shared_data / "tinystories-656k-llama-hf")
    assert (small.bos_id, small.eos_id) == (1, 2)
    assert small.decode(small.encode("Hello world")) == "Hello world"


@given(st.text(max_size=30), st.integers(0, 10))
def test_streamed_pieces_join_to_the_text(text: str, split: int) -> None:
    ids = BYTES.encode(text)
    stream = BYTES.stream(ids[:split])
    pieces = [stream.push(i) for i in ids[split:]] + [stream.flush()]
    expected = text.encode()[split:]
    if split <= len(ids) and not (expected and expected[0] & 0xC0 == 0x80):
        assert "".join(pieces) == expected.decode()
        # Each piece comes as soon as its last byte does.
        assert not pieces[-1]


@pytest.mark.parametrize(
    "text", ["🙂" * 30, "日本語🙂 naïve " * 6, "a\n\n🙂🙂\n b", "\U0010ffff漢"]
)
@pytest.mark.parametrize("split", [0, 1, 7, 20])
def test_streaming_byte_fallback(text: str, split: int, llama2: Tokenizer) -> None:
    # Llama 2 spells rare characters as bytes, and its decoder voids a run of bytes until the last
    # is there: text that was complete turns into U+FFFD and back.
    ids = llama2.encode(text)
    stream = llama2.stream(ids[:split])
    pieces = [stream.push(i) for i in ids[split:]] + [stream.flush()]
    before = llama2.decode(ids[:split])
    if not before.endswith("\ufffd"):
        assert before + "".join(pieces) == text


def test_streaming_tokens_that_straddle_characters() -> None:
    # Byte-level vocabularies may join the end of one character with the start of the next, so that
    # no token ends where a character does. Each character still comes with its last byte.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    [(encoded, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("éé")
    vocabulary[encoded[1:3]] = len(vocabulary)
    fast = FastTokenizer(models.BPE(vocabulary, [(encoded[1], encoded[2])]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    fast.decoder = decoders.ByteLevel()  # type: ignore
    tokenizer = Tokenizer(fast)
    stream, ids = tokenizer.stream(), tokenizer.encode("é" * 40)
    assert len(ids) == 41
    assert [stream.push(i) for i in ids] == [""] + ["é"] * 40


def test_streaming_continues_the_prompt(llama2: Tokenizer) -> None:
    ids = llama2.encode("Once upon a time, 🙂 there")
    whole = llama2.stream()
    assert [whole.push(i) for i in ids[:4]] == ["", "Once", " upon", " a"]
    # After a prompt the first word keeps its space.
    after = llama2.stream(ids[:4])
    pieces = [after.push(i) for i in ids[4:]]
    assert pieces[0] == " time" and "".join(pieces) == " time, 🙂 there"
    both = llama2.stream(ids[:4])
    assert both.push(ids[4:]) == " time, 🙂 there"
    # An end-of-sequence id has no text, and the text goes on after it.
    assert after.push(2) == "" and after.push(ids[4]) == " time"


def test_streaming_incomplete_and_invalid_bytes() -> None:
    ids = BYTES.encode("a🙂")
    stream = BYTES.stream()
    assert [stream.push(i) for i in ids[:4]] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    # Bytes that can never become a character are given out, not held for ever.
    stream = BYTES.stream()
    pieces = [stream.push(ids[2]) for _ in range(20)]
    assert "".join(pieces) == "\ufffd" * 17 and stream.flush() == "\ufffd" * 3
    stream = BYTES.stream(skip_special_tokens=False)
    assert BYTES.eos_id is not None and stream.push(BYTES.eos_id) == "</s>"


TEMPLATE = """{%- if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{% generation %}[{{ m.content }}]{{ eos_token }}{% endgeneration
    %} {%- else %}<{{ m.content }}>{% endif %} {%- if loop.index == 9 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ 'think:' if thinking else '' }}[{% endif %}"""
USER = {"role": "user", "content": "né"}


def test_chat_template() -> None:
    chat = byte_tokenizer(chat_template=TEMPLATE)
    assert chat.render_chat([USER]) == "<s><né>["
    assert chat.render_chat([USER], thinking=True) == "<s><né>think:["
    turns = [USER, {"role": "assistant", "content": "ok"}, USER]
    assert chat.render_chat(turns, add_generation_prompt=False) == "<s><né>[ok]</s><né>"
    assert chat.render_chat([USER], tools=[{"a": "<ü>"}]).endswith('[{"a": "<ü>"}][')
    ids = chat.encode_chat([USER])
    assert ids[0] == chat.bos_id and chat.decode(ids) == "<né>["
    with pytest.raises(ValueError, match="does not accept these messages: user first"):
        chat.render_chat([{"role": "assistant", "content": ""}])
    with pytest.raises(ValueError, match="messages is empty"):
        chat.render_chat([])
    with pytest.raises(ValueError, match="has no chat template"):
        BYTES.render_chat([USER])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[0].nothing.at.all }}",
    ],
)
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(ValueError, match="does not accept"):
        byte_tokenizer(chat_template=attack).render_chat([USER])


def test_where_templates_are_found(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(shared_data / "tok-llama2" / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": named}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat([USER]) == "D"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, None)
    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert Tokenizer.from_folder(tmp_path).render_chat([USER]) == "J<s>"
    config.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(ValueError, match="eos_token='<|im_end|>' .* is not in tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    config.write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_missing_or_broken_tokenizer(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="no tokenizer.json .tokenizer.model alone is not read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json is no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
