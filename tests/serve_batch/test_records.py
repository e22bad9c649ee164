import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import Completion, Sampling
from core.requests import TokenScore
from serve_batch import records
from serve_batch.records import Prompt, RowError, Source

DEFAULTS = Sampling(max_new_tokens=7, seed=5, logprobs=2)


TALK = [{"role": "user", "content": "hi"}]


def parse(line: bytes | dict, format: records.Format = "jsonl") -> Prompt | RowError:
    line = json.dumps(line).encode() if isinstance(line, dict) else line
    return records.parse(line, format, DEFAULTS)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "blank_line"),
        (b"\n", "blank_line"),
        (b"\r\n", "blank_line"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b"x" * (records.MAX_LINE_BYTES + 1), "line_too_long"),
        (b'{"prompt": "' + b"x" * records.MAX_LINE_BYTES + b'"}', "line_too_long"),
        (b"not json", "bad_json"),
        (b"   ", "bad_json"),
        (b'{"prompt": "a"', "bad_json"),
        (b'{"prompt": "a\x00"}', "bad_json"),
        (b'{"prompt": "a"} x', "bad_json"),
        (b'{"prompt": "a"}{}', "bad_json"),
        (b'{"prompt": "a", "x": NaN}', "bad_json"),
        (b'{"prompt": "a", "x": 1e999}', "bad_json"),
        (b'{"prompt": "a", "x": 1' + b"0" * 5000 + b"}", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"prompt": "x", "z": ' + b'{"a": ' * 600 + b"1" + b"}" * 601, "bad_json"),
        (b'{"prompt": "x", "z": ' + b"[" * 100 + b"]" * 100 + b"}", "bad_json"),
        (b'["prompt"]', "not_an_object"),
        (b'"prompt"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"17", "not_an_object"),
        ({}, "prompt_missing"),
        ({"prompt": None}, "prompt_missing"),
        ({"prompt": 3}, "prompt_wrong_type"),
        ({"prompt": ["a"]}, "prompt_wrong_type"),
        (b'{"prompt": "\\ud800"}', "prompt_wrong_type"),
        ({"token_ids": "1,2"}, "prompt_wrong_type"),
        ({"token_ids": [1, 2.0]}, "prompt_wrong_type"),
        ({"token_ids": [True]}, "prompt_wrong_type"),
        ({"prompt": "a", "token_ids": [1]}, "prompt_ambiguous"),
        ({"prompt": "a", "id": 1.5}, "bad_id"),
        ({"prompt": "a", "id": True}, "bad_id"),
        ({"prompt": "a", "id": ["x"]}, "bad_id"),
        (b'{"prompt": "a", "id": "\\udfff"}', "bad_id"),
        ({"prompt": "a", "temperature": "hot"}, "bad_parameter"),
        ({"prompt": "a", "temperature": -1}, "bad_parameter"),
        ({"prompt": "a", "temperature": 10**400}, "bad_parameter"),
        ({"prompt": "a", "top_k": 1.5}, "bad_parameter"),
        ({"prompt": "a", "top_k": True}, "bad_parameter"),
        ({"prompt": "a", "max_new_tokens": -1}, "bad_parameter"),
        ({"prompt": "a", "seed": 2**64}, "bad_parameter"),
        ({"prompt": "a", "stop": ""}, "bad_parameter"),
        ({"prompt": "a", "stop": ["a", 3]}, "bad_parameter"),
        ({"prompt": "a", "ignore_eos": 1}, "bad_parameter"),
        ({"prompt": "a", "presence_penalty": 2.5}, "bad_parameter"),
        ({"prompt": "a", "frequency_penalty": "much"}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": [[1, 2.0]]}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"7": 1, "07": 2}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"9999999999": 1}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "bad_parameter"),
        ({"prompt": "a", "logit_bias": {"1": None}}, "bad_parameter"),
        ({"prompt": "a", "bad_ids": 3}, "bad_parameter"),
        ({"prompt": "a", "bad_ids": [1, True]}, "bad_parameter"),
        ({"prompt": "a", "allowed_ids": [1.5]}, "bad_parameter"),
        ({"prompt": "a", "allowed_ids": [-1]}, "bad_parameter"),
        ({"prompt": "a", "min_new_tokens": 8}, "bad_parameter"),  # of at most 7
        ({"prompt": "a", "min_new_tokens": "2"}, "bad_parameter"),
        ({"prompt": "a", "n": 0}, "bad_parameter"),
        ({"prompt": "a", "n": records.MAX_SAMPLES + 1}, "bad_parameter"),
        ({"prompt": "a", "n": 10**1000}, "bad_parameter"),
        ({"prompt": "a", "n": True}, "bad_parameter"),
        ({"prompt": "a", "n": "2"}, "bad_parameter"),
        ({"prompt": "a", "logprobs": 3}, "bad_parameter"),  # of at most 2
        ({"prompt": "a", "logprobs": -1}, "bad_parameter"),
        ({"prompt": "a", "logprobs": True}, "bad_parameter"),
        ({"prompt": "a", "logprobs": 10**400}, "bad_parameter"),
        ({"messages": "hi"}, "bad_messages"),
        ({"messages": []}, "bad_messages"),
        ({"messages": [{"role": "nobody", "content": "hi"}]}, "bad_messages"),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "bad_messages"),
        ({"messages": TALK, "tools": "hammer"}, "bad_messages"),
        ({"messages": TALK, "reasoning_effort": 3}, "bad_messages"),
        ({"messages": TALK, "prompt": "hi"}, "prompt_ambiguous"),
    ],
)
def test_a_bad_line_is_an_error_with_a_stable_code(line, code):
    error = parse(line)
    assert isinstance(error, RowError)
    assert error.code == code
    assert error.message


def test_a_prompt_carries_its_id_its_parameters_and_the_fields_that_nobody_knows():
    own = {
        "max_new_tokens": 3,
        "temperature": 0,
        "top_k": 2,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "bad_ids": [4, 9],
        "allowed_ids": [9, 4, 2],
        "min_new_tokens": 2,
        "stop": ["\n", "END"],
        "seed": 11,
        "ignore_eos": True,
        "logprobs": 1,
    }
    bias = {"logit_bias": {"50256": -100, "0": 0.5}}
    row = parse({"id": 7, "prompt": "a", "n": 3, **own, **bias, "label": {"gold": [1, None]}})
    assert row == Prompt(
        prompt="a",
        sampling=Sampling(**own, logit_bias={50256: -100, 0: 0.5}),
        n=3,
        id=7,
        input={"label": {"gold": [1, None]}},
    )


def test_null_and_absent_parameters_are_the_jobs():
    assert parse({"prompt": "a", "top_k": None}) == parse({"prompt": "a"})
    assert parse({"prompt": "a"}) == Prompt(prompt="a", sampling=DEFAULTS)


def test_white_space_around_an_object_is_no_part_of_it():
    assert parse(b' \t{"prompt": "a"} \t\r\n') == parse({"prompt": "a"})


def test_token_ids_are_a_prompt():
    assert parse({"token_ids": [3, 1]}) == Prompt(prompt=(3, 1), sampling=DEFAULTS)


def test_messages_are_a_prompt_with_what_belongs_to_them():
    row = {"messages": TALK, "tools": [{"a": 1}], "reasoning_effort": "low", "label": 1}
    prompt = parse(row)
    assert isinstance(prompt, Prompt)
    assert prompt.prompt == records.Conversation(TALK, [{"a": 1}], {"reasoning_effort": "low"})
    assert prompt.input == {"label": 1}
    del row["messages"]
    assert parse(row | {"prompt": "a"}).input == row  # without messages they are anybody's


def test_an_error_keeps_the_id_and_the_unknown_fields():
    error = parse({"id": "x", "prompt": "a", "top_k": 1.5, "seed": 1, "label": "gold"})
    assert isinstance(error, RowError)
    assert (error.id, error.input) == ("x", {"label": "gold"})


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_text_line_is_a_prompt_to_the_last_space(ending):
    expected = Prompt(prompt='  {"prompt": 1} \x00 \u2028', sampling=DEFAULTS)
    assert parse(b'  {"prompt": 1} \x00 \xe2\x80\xa8' + ending, "text") == expected


def test_the_longest_line_that_is_allowed_is_a_prompt():
    assert isinstance(parse(b"x" * records.MAX_LINE_BYTES + b"\r\n", "text"), Prompt)


WHERE: dict[str, Any] = {
    "index": 3,
    "source": Source("a.jsonl", 20, 2),
    "model": {"name": "m", "revision": "r"},
}
SCORES = (TokenScore(5, -0.5, ((5, -0.5), (7, float("-inf")))), TokenScore(6, -1.5, ()))


def completion(text: str, *tokens: int, **more: Any) -> Completion:
    return Completion(
        text=text, tokens=tokens, finish_reason="eos", prompt_tokens=(1, 2, 3), **more
    )


any_text = st.text(st.characters(exclude_categories=()))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=40)
@given(st.dictionaries(any_text, json_values))
def test_fields_are_one_line_for_every_reader_and_read_back_the_same(fields):
    line = records.to_json(fields)
    assert repr(json.loads(line)) == repr(fields)  # to the sign of zero, and the order of the keys
    assert line.decode().splitlines() == [line.decode()]


numbers = st.one_of(
    st.from_regex(r"-?[0-9]{1,25}(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.integers(-(2**66), 2**66).map(str),
    st.floats().map(repr),
)


@st.composite
def nearly_json(draw: st.DrawFn) -> bytes:
    """JSON with some bytes of it gone and others put in."""
    ascii = draw(st.booleans())
    text = json.dumps({"x": draw(json_values), "n": 0}, ensure_ascii=ascii)
    text = text.replace('"n": 0', f'"n": {draw(numbers)}')
    line = bytearray(text, "utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(line)))
        line[at : at + draw(st.integers(0, 3))] = draw(st.sampled_from(PIECES))
    return bytes(line)


PIECES = [
    b"",
    *b'"|\\|\\ud83d|\\ude00|{|}|[|]|,|:|"x":|e|-|.|0|1e|NaN|\xff|\xed\xa0\x80|\0|\t| |//'.split(
        b"|"
    ),
]


@settings(max_examples=300)
@given(nearly_json())
def test_no_line_means_more_to_the_fast_reader_than_to_the_strict_one(line):
    try:
        fast = records._READER.decode(line)
    except ValueError:
        return
    assert repr(records._STRICT.decode(line.decode())) == repr(fast)


@pytest.mark.parametrize(
    "value",
    [
        *(
            b"%d" % (sign * n)
            for n in (2**63, 2**64, 19933688932870350000, 10**300)
            for sign in (1, -1)
        ),
        b"-0.0",
        b"1e22",
        b"5e-324",
        b'"\\ud800 \\udc00\\ud83d"',
        b'{"b":1,"a":[{}],"":null}',
    ],
)
def test_what_nobody_knows_comes_out_as_it_came_in(value):
    row = parse(b'{"prompt": "a", "x": ' + value + b"}")
    line = records.to_line(records.record(row, [completion("b")], **WHERE))
    assert b'"input":{"x":' + value + b"}}\n" in line


def test_no_character_of_a_record_ends_its_line():
    text = "".join(map(chr, range(0x2030)))
    line = records.to_line(records.record(parse({"prompt": "a"}), [completion(text)], **WHERE))
    assert line.decode().splitlines(keepends=True) == [line.decode()]
    assert json.loads(line)["text"] == text


def test_an_id_beyond_64_bits_keeps_its_digits():
    for number in (2**64, -(2**63) - 1, 19933688932870350000, 10**1000 + 1):
        row = parse(b'{"prompt": "a", "id": %d}' % number)
        line = records.to_line(records.record(row, [completion("b")], **WHERE))
        assert b'"id":%d,' % number in line


def test_of_a_name_that_comes_twice_the_last_counts():
    assert parse(b'{"prompt": "a", "prompt": "b", "seed": 1, "seed": 2}') == parse(
        {"prompt": "b", "seed": 2}
    )


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(lambda text, ids: completion(text, *ids), any_text, st.lists(st.integers(0, 99)))
    ),
    st.none() | st.integers() | st.text(),
    any_text,
    st.dictionaries(st.text(), json_values),
)
def test_a_record_s_line_is_the_record_as_json(samples, row_id, file, fields):
    where: dict[str, Any] = {**WHERE, "source": Source(file, 7, 1)}
    prompt = Prompt(prompt="a", sampling=DEFAULTS, id=row_id, input=fields)
    error = RowError(code="bad", message=file, id=row_id, input=fields)
    row, result = (prompt, samples) if samples else (error, error)
    record = records.record(row, result, **where)
    line = records.to_line(record)
    assert repr(json.loads(line)) == repr(record)
    assert line.decode().splitlines() == [line.decode()[:-1]]


@given(st.binary())
def test_no_line_raises(line):
    assert isinstance(parse(line), Prompt | RowError)
    assert isinstance(parse(line, "text"), Prompt | RowError)


def test_every_record_has_the_same_keys():
    prompt = Prompt(prompt="a", sampling=DEFAULTS, input={"label": 1})
    error = RowError(code="bad_json", message="no")
    ok = records.record(prompt, [completion("b", 5, 6)], **WHERE)
    several = records.record(prompt, [completion("b"), completion("c")], **WHERE)
    failed = records.record(error, error, **WHERE)
    assert list(ok) == list(failed) == list(several)
    assert ok | {"schema_version": 2} == {
        "schema_version": 2,
        "id": "a.jsonl:20",
        "index": 3,
        "source": {"file": "a.jsonl", "offset": 20, "line": 2},
        "status": "ok",
        "text": "b",
        "channels": None,
        "tool_calls": None,
        "token_ids": [5, 6],
        "finish_reason": "eos",
        "logprobs": None,
        "completion_tokens": 2,
        "prompt_tokens": 3,
        "truncated_tokens": 0,
        "samples": None,
        "error": None,
        "seed": 5,
        "model": {"name": "m", "revision": "r"},
        "input": {"label": 1},
    }
    assert failed["error"] == {"code": "bad_json", "message": "no"}
    assert all(failed[key] is None for key in records._NOTHING.keys() - {"status", "finish_reason"})


def test_of_several_samples_the_first_stands_for_the_row_and_all_are_listed():
    prompt = Prompt(prompt="a", sampling=DEFAULTS, n=2)
    answers = [{"text": "B", "channels": {"final": "B"}, "tool_calls": []}, {"text": "C"}]
    samples = [completion("b", 5), completion("c", 6, 7)]
    record = records.record(prompt, samples, **WHERE, answers=answers, truncated=4)
    first, second = record["samples"]
    assert {key: record[key] for key in first} == first | {"completion_tokens": 3}
    assert (first["text"], first["channels"], second["text"]) == ("B", {"final": "B"}, "C")
    assert (second["token_ids"], second["completion_tokens"]) == ([6, 7], 2)
    assert (record["prompt_tokens"], record["truncated_tokens"]) == (3, 4)


def test_a_log_probability_that_json_cannot_say_is_null():
    prompt = Prompt(prompt="a", sampling=DEFAULTS)
    record = records.record(prompt, [completion("b", 5, 6, logprobs=SCORES)], **WHERE)
    assert json.loads(records.to_line(record))["logprobs"] == [
        {
            "token": 5,
            "logprob": -0.5,
            "top": [{"token": 5, "logprob": -0.5}, {"token": 7, "logprob": None}],
        },
        {"token": 6, "logprob": -1.5, "top": []},
    ]
