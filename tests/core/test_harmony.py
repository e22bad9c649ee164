import hypothesis
import hypothesis.strategies as st
import pytest

import chat_templates
from core import harmony
from core.harmony import Message

TOKENIZER = chat_templates.tokenizer("harmony")
SPECIAL = ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>"]

THOUGHT = "<|channel|>analysis<|message|>Flax, é😀.<|end|>"
ANSWER = "<|start|>assistant<|channel|>final<|message|>Flax.<|return|>"
SAID = [
    Message(channel="analysis", content="Flax, é😀.", end="<|end|>"),
    Message(channel="final", content="Flax.", end="<|return|>"),
]


def parse(text: str, **options):
    return harmony.parse(TOKENIZER, TOKENIZER.encode(text), **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "an answer": (THOUGHT + ANSWER, SAID),
        "with the header that the prompt has": ("<|start|>assistant" + THOUGHT + ANSWER, SAID),
        "to a tool, named with the role": (
            " to=functions.spin<|channel|>commentary json<|message|>{}<|call|>",
            [Message("assistant", "commentary", "functions.spin", "json", "{}", "<|call|>")],
        ),
        "to a tool, named with the channel": (
            "<|channel|>commentary to=functions.spin <|constrain|>json<|message|>{}<|call|>",
            [Message("assistant", "commentary", "functions.spin", "json", "{}", "<|call|>")],
        ),
        "to a tool, its type without a space": (
            "<|channel|>commentary to=functions.spin<|constrain|>json<|message|>{}<|call|>",
            [Message("assistant", "commentary", "functions.spin", "json", "{}", "<|call|>")],
        ),
        "of a tool": (
            "<|start|>functions.spin to=assistant<|channel|>commentary<|message|>ok<|end|>",
            [Message("functions.spin", "commentary", "assistant", None, "ok", "<|end|>")],
        ),
        "cut off": (
            "<|channel|>analysis<|message|>Fl",
            [Message(channel="analysis", content="Fl")],
        ),
        "cut off in a header": (THOUGHT + "<|start|>assistant<|channel|>fi", SAID[:1]),
        "without a header": ("Flax.<|return|>", [Message(content="Flax.", end="<|return|>")]),
        "without a channel": ("<|message|>Flax.", [Message(content="Flax.")]),
        "that begins like a recipient": (" tomorrow", [Message(content=" tomorrow")]),
        "of a recipient alone": (" to=", [Message(content=" to=")]),
        "without an end": (
            THOUGHT[:-7] + ANSWER,
            [Message(channel="analysis", content="Flax, é😀."), SAID[1]],
        ),
        "without an end and a start": (
            THOUGHT[:-7] + "<|channel|>final<|message|>Flax.<|return|>",
            [Message(channel="analysis", content="Flax, é😀."), SAID[1]],
        ),
        "without a start": (THOUGHT + "<|channel|>final<|message|>Flax.<|return|>", SAID),
        "text between": (
            THOUGHT + "So: " + ANSWER,
            [SAID[0], Message(content="So: "), SAID[1]],
        ),
        "of nothing": ("<|channel|>final<|message|><|return|>", [Message(channel="final", end="<|return|>")]),
        "that never was": ("<|channel|>final<|return|>", []),
    }.values(),
)  # fmt: skip
def test_an_answer_is_its_messages(text, expected):
    assert parse(text) == expected


def test_channels_are_what_is_said_and_calls_are_apart():
    messages = parse(
        THOUGHT
        + "<|channel|>commentary<|message|>I look.<|end|>"
        + THOUGHT
        + "<|channel|>commentary to=functions.spin<|message|>{}<|end|>"
        + ANSWER
    )
    assert harmony.channels(messages) == {
        "analysis": "Flax, é😀.\nFlax, é😀.",
        "commentary": "I look.",
        "final": "Flax.",
    }
    assert harmony.calls(messages) == [
        {"recipient": "functions.spin", "content_type": None, "content": "{}"}
    ]


def test_text_without_a_header_is_for_the_reader():
    assert harmony.answer(TOKENIZER, TOKENIZER.encode("Hello")) == {
        "text": "Hello",
        "channels": {"final": "Hello"},
        "tool_calls": [],
    }


def test_the_last_message_ends_before_a_stop_string():
    assert [m.content for m in parse(THOUGHT + ANSWER[:-10], stop=("x.", "ax"))] == [
        "Flax, é😀.",
        "Fl",
    ]


@hypothesis.given(st.lists(st.sampled_from([*SPECIAL, "assistant", " to=a", "é😀", "x", "\n"])))
def test_pieces_as_they_come_are_the_messages(parts):
    parser = harmony.Parser(TOKENIZER)
    pieces = [parser.push(id_) for id_ in TOKENIZER.encode("".join(parts))] + [parser.finish()]
    assert "".join(p.text for p in pieces if p) == "".join(m.content for m in parser.messages)
    assert parser.messages == parse("".join(parts))


def test_a_piece_is_known_as_soon_as_its_token_is():
    parser = harmony.Parser(TOKENIZER)
    pieces = [parser.push(id_) for id_ in TOKENIZER.encode("<|channel|>final<|message|>aé")]
    assert [p and p.text for p in pieces[-4:]] == [None, "a", None, "é"]
    assert [p and p.text for p in map(harmony.Parser(TOKENIZER).push, TOKENIZER.encode("Hi"))] == [
        "H",
        "i",
    ]


def test_harmony_is_a_matter_of_the_tokenizer():
    assert harmony.is_spoken_by(TOKENIZER)
    assert not harmony.is_spoken_by(chat_templates.tokenizer("chatml"))


def test_analysis_before_the_last_final_answer_is_left_out():
    call = {"role": "assistant", "thinking": "t", "tool_calls": [{}]}
    final = {"role": "assistant", "thinking": "t", "reasoning_content": "t", "content": "c"}
    user = {"role": "user", "content": "u", "thinking": "mine"}
    kept = harmony.without_old_analysis([user, call, final, user, call])
    assert kept == [
        {"role": "user", "content": "u"},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "assistant", "content": "c"},
        user,
        call,
    ]
    asked = call | {"content": "I call."}
    for kept in ([user, call], [user, asked, user], [user, call, final], [final]):
        assert harmony.without_old_analysis(kept) == kept


def test_half_a_character_stays_in_the_message_that_it_ends():
    half = TOKENIZER.encode("é")[:1]
    ids = TOKENIZER.encode("<|message|>a") + half + TOKENIZER.encode("<|end|>b")
    assert [m.content for m in harmony.parse(TOKENIZER, ids)] == ["a\ufffd", "b"]
