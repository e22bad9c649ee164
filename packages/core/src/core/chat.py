"""Chat messages to token ids, through the chat template that a checkpoint brings.

A template is a Jinja program that somebody else wrote. It runs in Jinja's sandbox with what transformers'
`apply_chat_template` gives it, and nothing more; its loops and calls are counted, so that it ends. The text that it
makes is transformers', character for character.

What it writes and what the messages hold are kept apart: a special token that is written out in a message is encoded as
plain text, and only those that the template writes become special tokens. (transformers does so with
`sanitize_control_tokens=True`; by its default a user's "<|im_end|>" ends the message.) Three things cannot be told
apart: what the template joins from parts of messages ('<|' + role + '|>', hence the fixed `ROLES`), what it takes
from two strings of which neither is a special token, and what a template does on purpose.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.exceptions import SecurityError

from core import harmony
from core.errors import RequestError, TokenizerError
from core.tokenizer import Tokenizer, read_settings

Message = Mapping[str, Any]
"""{"role": ..., "content": ...} and whatever else the template knows, as JSON has it."""

ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATE_FILE = "chat_template.jinja"
MAX_STEPS = 200_000
"""Rounds of loops, calls and numbers of ranges that a template may take for one conversation."""
MAX_REPEATED = 1_000_000
"""Characters or items that a template may make with one `*`."""

_SPECIAL_TOKENS = tuple(f"{kind}_token" for kind in "bos eos unk sep pad cls mask".split())
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Private-use characters around what a message holds; taken out of the messages first, so that none can be forged.
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"


class _Given(NamedTuple):
    messages: list[dict[str, Any]]
    tools: Any
    variables: dict[str, Any]


class Chat:
    """A chat template with the tokenizer that belongs to it; may be shared between threads."""

    def __init__(
        self, template: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str] | None = None
    ):
        """Takes what `open` finds; `special_tokens` are the template's `bos_token` and so on.

        Raises:
          TokenizerError: `template` is not a template.
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
        )
        try:
            tree = environment.parse(template)
            self._literals = "\0".join(_literals(tree))
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None)
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise TokenizerError(f"the chat template is not one: {error}") from error
        self._template = jinja2.Template.from_code(environment, code, environment.globals)

    @classmethod
    def find(cls, folder: str | Path, tokenizer: Tokenizer) -> "Chat | None":
        """Opens the template of a model folder: chat_template.jinja, else the one in tokenizer_config.json.

        Where there are several by name, it is "default". None where the folder has none.

        Raises:
          TokenizerError: a file cannot be read, or holds no template.
        """
        folder = Path(folder)
        settings = read_settings(folder)
        template = _read_template(folder, settings.get("chat_template"))
        if template is None:
            return None
        tokens = {
            name: token.get("content") if isinstance(token, dict) else token
            for name in _SPECIAL_TOKENS
            if (token := settings.get(name)) is not None
        }
        return cls(template, tokenizer, {n: t for n, t in tokens.items() if isinstance(t, str)})

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer) -> "Chat":
        """Opens the template of a model folder as `find` does.

        Raises:
          TokenizerError: a file cannot be read, or holds no template.
          RequestError: `chat_template_missing`.
        """
        chat = cls.find(folder, tokenizer)
        if chat is None:
            raise missing(folder)
        return chat

    def render(
        self,
        messages: Sequence[Message],
        *,
        now: datetime.datetime,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the conversation as text, as transformers' `apply_chat_template(tokenize=False)` does.

        Args:
          messages: the conversation; see `check`.
          now: what a template is told that asks for the time.
          tools: JSON schemas of functions, for templates that know them.
          add_generation_prompt: ends with what an answer begins with.
          variables: more of what the template knows, such as gpt-oss's `reasoning_effort`.

        Raises:
          RequestError: `bad_messages`, or `chat_template_failed`: the template refuses them or does not end.
        """
        given = _Given(check(messages), _json_of(tools), _json_of(variables or {}))
        return self._render(given, now, add_generation_prompt)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        now: datetime.datetime,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the token ids of `render`, special tokens where the template writes them and nowhere else.

        In harmony, the reasoning before the last final answer is left out first, whatever the template does with it.

        Raises:
          RequestError: as `render`, and `bad_prompt`: a character that the vocabulary lacks.
        """
        checked = check(messages)
        if harmony.is_spoken_by(self._tokenizer):
            checked = harmony.without_old_analysis(checked)
        given = _Given(checked, _json_of(tools), _json_of(variables or {}))
        given = _Given(*(_changed(value, _without_marks) for value in given))
        text = self._render(given, now, add_generation_prompt)
        marked_given = _Given(*(_changed(value, self._mark) for value in given))
        try:
            if marked_given == given:
                return self._tokenizer.encode(text)
            marked = self._render(marked_given, now, add_generation_prompt)
            if _without_marks(marked) != text:
                raise RequestError(
                    "bad_messages",
                    "the messages hold a special token that the chat template takes apart; remove it",
                )
            return self._encode_marked(marked)
        except TokenizerError as error:
            raise RequestError("bad_prompt", str(error)) from error

    def _render(self, given: "_Given", now: datetime.datetime, add_generation_prompt: bool) -> str:
        steps = _steps.set([0])
        try:
            return self._template.render(
                self._special_tokens
                | {"strftime_now": now.strftime}
                | {"messages": given.messages, "tools": given.tools, "documents": None}
                | {"add_generation_prompt": add_generation_prompt}
                | given.variables
            )
        except Exception as error:  # it is a program: it may fail in any way
            raise RequestError(
                "chat_template_failed",
                f"the chat template does not take these messages: {error or type(error).__name__}",
            ) from error
        finally:
            _steps.reset(steps)

    @functools.cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """What a message must not smuggle in: special tokens, and the added ones that the template itself writes."""
        tokens = [
            token
            for token, is_special in self._tokenizer.added_tokens.items()
            if is_special or (token in self._literals and not token.isspace())
        ]
        longest_first = sorted(tokens, key=len, reverse=True)
        # In any case, because a template may change it.
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)

    def _mark(self, text: str) -> str:
        """Returns `text` with every control token in it between marks."""
        return self._control_tokens.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)

    def _encode_marked(self, marked: str) -> list[int]:
        """Encodes what is between marks as plain text; a mark alone still parts what is beside it."""
        whole = f"{_OPEN}({self._control_tokens.pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]"
        pieces = re.split(whole, marked, flags=re.IGNORECASE)
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            if piece:
                is_plain = at % 2 == 1
                ids += (self._tokenizer.encode_plain if is_plain else self._tokenizer.encode)(piece)
        return ids


def missing(folder: str | Path) -> RequestError:
    """Returns the error for a model without a chat template."""
    return RequestError(
        "chat_template_missing",
        f"{folder} has no chat template: it is no chat model, or {TEMPLATE_FILE} was not beside its weights when it "
        f"was converted. Copy that file into the folder, or give a prompt as plain text",
    )


def check(messages: Any) -> list[dict[str, Any]]:
    """Returns a copy of `messages` as a template sees them: without what is None, reasoning under every name.

    Raises:
      RequestError: `bad_messages`: they are no list of objects that have a role of `ROLES`; they hold what JSON cannot.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("bad_messages", "the messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                "bad_messages",
                f"message {number} must be an object with 'role' and 'content', found {message!r:.60}",
            )
        if message.get("role") not in ROLES:
            raise RequestError(
                "bad_messages",
                f"the role of message {number} must be one of {', '.join(ROLES)}; found {message.get('role')!r:.60}",
            )
        given = {key: item for key, item in _json_of(message).items() if item is not None}
        reasoning = next((given[name] for name in _REASONING if name in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning} | given | {"reasoning_content": reasoning}
        checked.append(given)
    return checked


def _json_of(value: Any, depth: int = 0) -> Any:
    """Returns a copy of JSON data, so that a template gets no other object in its hands."""
    if depth > 100:
        raise RequestError("bad_messages", "the messages are nested too deeply")
    if isinstance(value, str):
        if not _is_unicode(value):
            raise RequestError("bad_messages", "the messages hold a lone surrogate")
        return value
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {_json_of(str(key)): _json_of(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_of(item, depth + 1) for item in value]
    raise RequestError("bad_messages", f"the messages hold a {type(value).__name__}, expected JSON")


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns JSON data with every string in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value


def _without_marks(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _is_unicode(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return True
    return False


def _read_template(folder: Path, setting: Any) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
    if isinstance(setting, list):
        named = {t.get("name"): t.get("template") for t in setting if isinstance(t, dict)}
        if "default" not in named:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'} has chat templates by name, and none is 'default'; "
                f"write the one to use into {TEMPLATE_FILE}"
            )
        setting = named["default"]
    if setting is not None and not isinstance(setting, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of named ones"
        )
    return setting


def _literals(tree: nodes.Template) -> Iterator[str]:
    """Yields the text that a template writes, and its string constants."""
    for data in tree.find_all(nodes.TemplateData):
        yield data.data
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


_COUNTED = "counted "  # a name that no template can spell
_steps: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps")


def _count(steps: int = 1) -> None:
    taken = _steps.get()
    taken[0] += steps
    if taken[0] > MAX_STEPS:
        raise SecurityError(f"it does not end within {MAX_STEPS:,} steps")


def _counted(values: Any) -> Iterator[Any]:
    for value in values:
        _count()
        yield value


def _range(*args: int) -> range:
    numbers = sandbox.safe_range(*args)
    _count(len(numbers))
    return numbers


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the names that chat templates expect (transformers 5, chat_template_utils.py)."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters |= {"tojson": _to_json, _COUNTED: _counted}
        self.globals |= {
            "raise_exception": _raise,
            "range": _range,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _count()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and max(map(_magnitude, (left, right))) > 1000:
            raise SecurityError("it raises numbers to too high a power")
        size = max((len(x) for x in (left, right) if isinstance(x, str | list | tuple)), default=0)
        if size * max(_magnitude(left), _magnitude(right)) > MAX_REPEATED:
            raise SecurityError(f"it repeats text beyond {MAX_REPEATED:,} characters")
        return super().call_binop(context, operator, left, right)


def _magnitude(value: Any) -> float:
    return abs(value) if isinstance(value, int | float) else 0


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON; Jinja's own filter escapes for HTML."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    for mark in (_OPEN, _CLOSE):  # must outlive ensure_ascii
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


class _Dict:
    """The two things that templates do with `dict`; the type itself would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, which would take `__class__` and its like."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class _Generation(ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is only read over."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
