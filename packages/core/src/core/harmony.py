"""Harmony, the format in which gpt-oss answers: token ids to messages in channels, as they come.

    <|start|>{role}[ to=recipient]<|channel|>{channel}[ to=recipient][ <|constrain|>type]<|message|>{content}<|end|>

A prompt ends with `<|start|>assistant`, so an answer begins in the middle of a header; `<|return|>` and `<|call|>` end
it. A model that is small, or cut off, keeps the format badly, and nothing that it says is an error: a channel without a
new header begins a message, and text where a header should be is a message without a channel.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from core.tokenizer import TextStream, Tokenizer

FINAL = "final"
_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_REASONING = ("thinking", "reasoning_content", "reasoning")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of an answer; `recipient` is the tool that it calls, `end` the token that ended it, if one did."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    content: str = ""
    end: str | None = None


class Piece(NamedTuple):
    """Text that has just become certain, and the header of the message that it goes on with."""

    message: Message
    text: str


def is_spoken_by(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has harmony's special tokens."""
    added = tokenizer.added_tokens
    return all(added.get(token, False) for token in (_START, _CHANNEL, _MESSAGE, *_ENDS))


def parse(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> list[Message]:
    """Returns the messages of an answer; the last one ends before a string of `stop`."""
    parser = Parser(tokenizer)
    for id_ in ids:
        parser.push(id_)
    parser.finish()
    messages = list(parser.messages)
    if messages:
        content = messages[-1].content
        found = [at for text in stop if (at := content.find(text)) >= 0]
        messages[-1] = dataclasses.replace(
            messages[-1], content=content[: min(found, default=len(content))]
        )
    return messages


def answer(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> dict[str, Any]:
    """Returns an answer as records have it: the final channel as `text`, every channel, the calls of tools."""
    messages = parse(tokenizer, ids, stop)
    said = channels(messages)
    return {"text": said.get(FINAL, ""), "channels": said, "tool_calls": calls(messages)}


def channels(messages: Iterable[Message]) -> dict[str, str]:
    """Returns what was said in each channel, its messages a line apart; calls of tools are not among them.

    What has no channel was meant for the reader: it counts as final.
    """
    said: dict[str, list[str]] = {}
    for message in messages:
        if message.recipient is None:
            said.setdefault(message.channel or FINAL, []).append(message.content)
    return {channel: "\n".join(texts) for channel, texts in said.items()}


def calls(messages: Iterable[Message]) -> list[dict[str, str | None]]:
    """Returns the calls of tools, in order: to whom, of what type, what."""
    return [
        {"recipient": m.recipient, "content_type": m.content_type, "content": m.content}
        for m in messages
        if m.recipient is not None
    ]


def without_old_analysis(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a conversation without the reasoning before a final answer that it goes on after, as gpt-oss was trained.

    A chain of tool calls that has not been answered yet keeps its own; so does an answer that is the last
    message, which is there to be learnt.
    """
    finals = [
        number
        for number, message in enumerate(messages[:-1])
        if message.get("role") == "assistant"
        and message.get("content")
        and not message.get("tool_calls")
    ]
    last = max(finals, default=-1)
    return [
        {key: value for key, value in message.items() if number > last or key not in _REASONING}
        for number, message in enumerate(messages)
    ]


class Parser:
    """Takes an answer's ids one at a time; `messages` are those that have begun to have content."""

    def __init__(self, tokenizer: Tokenizer):
        self.messages: list[Message] = []
        self._special = {
            tokenizer.encode(token)[0]: token
            for token in (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS)
            if token in tokenizer.added_tokens
        }
        self._text: TextStream = tokenizer.stream()
        self._begin("assistant")

    def push(self, id_: int) -> Piece | None:
        """Returns the text of a message that `id_` completes, if it does."""
        token = self._special.get(id_)
        if token is None:
            return self._said(self._text.push(id_))
        piece = self._said(self._text.flush())
        (self._ended if self._in_content else self._header)(token)
        return piece

    def finish(self) -> Piece | None:
        """Returns what was held back."""
        piece = self._said(self._text.flush())
        if piece is None and not self._in_content and not self._parts[1:]:
            return self._without_header() if self._parts[0].strip() and self._is_start else None
        return piece

    def _begin(self, role: str, *, is_start: bool = True) -> None:
        """Awaits a header; at the start its role is known, and it may be missing."""
        self._in_content = False
        self._is_start = is_start
        self._role = role
        self._parts = [""]  # of the header: role, then channel

    def _said(self, text: str) -> Piece | None:
        if not text:
            return None
        if self._in_content:
            message = self.messages[-1]
            self.messages[-1] = dataclasses.replace(message, content=message.content + text)
            return Piece(message, text)
        self._parts[-1] += text
        begun = self._parts[0]
        if self._is_start and not self._parts[1:] and not _may_be_recipient(begun):
            return self._without_header()
        return None

    def _without_header(self) -> Piece | None:
        text = self._parts[0]
        self._open(Message(self._role))
        return self._said(text)

    def _header(self, token: str) -> None:
        if token == _START:
            self._begin("", is_start=False)
        elif token == _CHANNEL:
            self._parts.append("")
        elif token == _CONSTRAIN:
            self._parts[-1] += " "
        elif token == _MESSAGE:
            self._open(_message(self._role, self._parts))
        else:  # a header that ends without a message
            self._begin("assistant")

    def _ended(self, token: str) -> None:
        if token == _START:
            self._begin("", is_start=False)
        elif token == _CHANNEL:  # where an end and a start are missing
            self._begin("assistant")
            self._parts.append("")
        elif token in _ENDS:
            self.messages[-1] = dataclasses.replace(self.messages[-1], end=token)
            self._begin("assistant")

    def _open(self, message: Message) -> None:
        self._in_content = True
        self.messages.append(message)


def _may_be_recipient(text: str) -> bool:
    return " to=".startswith(text[:4]) and not text[4:].count("\n")


def _message(role: str, parts: Sequence[str]) -> Message:
    """Returns the message that a header announces: a role, a channel, and words after either."""
    words, after_channel = parts[0].split(), " ".join(parts[1:]).split()
    if not role:
        role = words.pop(0) if words and not words[0].startswith("to=") else "assistant"
    named = [word for word in after_channel if not word.startswith("to=")]
    recipients = [word[3:] for word in words + after_channel if word.startswith("to=")]
    channel = named[0] if named else None
    content_type = named[1] if named[1:] else None
    return Message(role, channel, recipients[0] if recipients else None, content_type)
