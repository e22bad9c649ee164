"""Harmony as OpenAI's own library writes and reads it, in gpt-oss's vocabulary."""

import datetime
import gzip
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

import chat_templates
from core import harmony
from core.chat import Chat
from core.harmony import Message

pytestmark = pytest.mark.parity

TOKENIZER = chat_templates.tokenizer("harmony")
FILE = "o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
WHERE = "TIKTOKEN_ENCODINGS_BASE"


def vocabulary(folder: Path) -> Path:
    """Returns a folder with the vocabulary: the one that is named, or `folder`, with another package's copy."""
    named = os.environ.get(WHERE)
    if named and (Path(named) / FILE).exists():
        return Path(named)
    package = importlib.util.find_spec("bpe_openai")
    if package is None or package.origin is None:
        pytest.skip(
            f"{WHERE} names no folder with {FILE}, and bpe-openai, which has it, is not here"
        )
    data = gzip.decompress((Path(package.origin).parent / "data" / f"{FILE}.gz").read_bytes())
    assert hashlib.sha256(data).hexdigest() == SHA256
    (folder / FILE).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("openai_harmony")


@pytest.fixture(scope="module")
def encoding(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = vocabulary(tmp_path_factory.mktemp("vocabulary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WHERE, str(folder))
        return library.load_harmony_encoding("HarmonyGptOss")


def parsed_by_theirs(library: Any, encoding: Any, text: str) -> list[Message]:
    ids = encoding.encode(text, allowed_special="all")
    return [
        Message(
            role=m.author.name or m.author.role.value,
            channel=m.channel,
            recipient=m.recipient,
            # Theirs keeps the token before the type.
            content_type=m.content_type and m.content_type.removeprefix("<|constrain|>"),
            content="".join(part.text for part in m.content),
        )
        for m in encoding.parse_messages_from_completion_tokens(ids, library.Role.ASSISTANT)
    ]


def parsed_by_ours(text: str) -> list[Message]:
    """The messages without the tokens that ended them, of which theirs says nothing."""
    found = harmony.parse(TOKENIZER, TOKENIZER.encode(text))
    return [Message(m.role, m.channel, m.recipient, m.content_type, m.content) for m in found]


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>final<|message|>Flax.<|return|>",
        "<|channel|>final<|message|><|return|>",
        "<|message|>Flax.",
        "<|channel|>analysis<|message|>Flax, \u00e9\U0001f600.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Flax.<|return|>",
        " to=functions.spin<|channel|>commentary json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.spin <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.spin<|constrain|>json<|message|>{}<|call|>",
        "<|channel|>analysis<|message|>I call.<|end|>"
        "<|start|>assistant to=functions.spin<|channel|>commentary json<|message|>{}<|call|>",
        "<|channel|>analysis<|message|>I look.<|end|>"
        "<|start|>functions.spin to=assistant<|channel|>commentary<|message|>ok<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It spins.<|return|>",
        "<|channel|>analysis<|message|>Fl",
    ],
)
def test_answers_are_read_as_openai_s_library_reads_them(library: Any, encoding: Any, text: str):
    found = parsed_by_ours(text)
    assert found
    assert found == parsed_by_theirs(library, encoding, text)


said = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text)
answers = st.builds(
    Message,
    channel=st.sampled_from(["analysis", "commentary", "final"]),
    recipient=st.sampled_from([None, "functions.spin", "browser.open"]),
    content_type=st.sampled_from([None, "json", "code"]),
    content=said,
)


@hypothesis.given(st.lists(answers, min_size=1, max_size=4))
@hypothesis.settings(max_examples=60)
def test_what_openai_s_library_writes_is_read_as_it_was_meant(
    library: Any, encoding: Any, messages: list[Message]
):
    ids: list[int] = []
    for message in messages:
        one = library.Message.from_role_and_content(library.Role.ASSISTANT, message.content)
        one = one.with_channel(message.channel)
        if message.recipient:
            one = one.with_recipient(message.recipient)
        if message.content_type:
            one = one.with_content_type(f"<|constrain|>{message.content_type}")
        ids += encoding.render(one)
    text = encoding.decode_utf8(ids)
    assert parsed_by_ours(text.removeprefix("<|start|>assistant")) == messages


def test_a_conversation_is_written_as_openai_s_library_writes_it(
    library: Any, encoding: Any, tmp_path: Path
):
    """The reasoning before the last final answer is left out by both."""
    chat_templates.write(tmp_path, "harmony")
    chat = Chat.open(tmp_path, TOKENIZER)
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Flax or linen?"},
        {"role": "assistant", "thinking": "The user asks.", "content": "Flax."},
        {"role": "user", "content": "Why? \u00e9"},
    ]
    ours = TOKENIZER.decode(chat.encode(talk, now=datetime.datetime(2026, 11, 21)))
    role, message = library.Role, library.Message.from_role_and_content
    system = library.SystemContent.new().with_conversation_start_date("2026-11-21")
    system = system.with_reasoning_effort(library.ReasoningEffort.MEDIUM)
    theirs = [
        message(role.SYSTEM, system),
        message(role.DEVELOPER, library.DeveloperContent.new().with_instructions("Be brief.")),
        message(role.USER, "Flax or linen?"),
        message(role.ASSISTANT, "The user asks.").with_channel("analysis"),
        message(role.ASSISTANT, "Flax.").with_channel("final"),
        message(role.USER, "Why? \u00e9"),
    ]
    conversation = library.Conversation.from_messages(theirs)
    ids = encoding.render_conversation_for_completion(conversation, role.ASSISTANT)
    assert ours == encoding.decode_utf8(ids)
