"""Rows with messages, through the template of the model's folder."""

import datetime
import json

import pytest

import chat_templates
import core
import scripted
import serve_batch
from core.chat import Chat
from serve_batch import plan as plan_lib
from serve_batch.output import OutputFolder

TALK = [{"role": "user", "content": "Hi"}]
SAYS = (
    "<|channel|>analysis<|message|>Hm.<|end|>"
    '<|start|>assistant to=functions.spin<|channel|>commentary json<|message|>{"a": 1}<|call|>'
)
GREEDY = core.Sampling(temperature=0, max_new_tokens=150)
NOW = datetime.datetime(2026, 3, 4)


def encode(folder, talk, **more):
    tokenizer = core.Tokenizer.open(folder)
    return Chat.open(folder, tokenizer).encode(talk, now=NOW, **more)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """Answers `TALK` with `SAYS`; the date is always as long."""
    folder = tmp_path_factory.mktemp("models")
    chat_templates.write(folder / "files", "harmony")
    after = len(encode(folder / "files", TALK))
    scripted.write(folder / "speaker", "harmony", says=SAYS, after=after)
    return folder / "speaker"


@pytest.fixture
def run(speaker, tmp_path, read_parts):
    def call(model=speaker, output=tmp_path / "out"):
        serve_batch.run(
            model=model,
            input=tmp_path / "input" / "*",
            output=output,
            sampling=GREEDY,
            slots=4,
        )
        return read_parts(output)

    return call


def test_an_answer_to_messages_has_channels_and_calls(run, write_jsonl):
    write_jsonl([{"messages": TALK, "label": 3}, {"prompt": "Hi"}])
    chat, plain = run()
    assert chat["status"] == "ok"
    assert chat["text"] == ""
    assert chat["channels"] == {"analysis": "Hm."}
    assert chat["tool_calls"] == [
        {"recipient": "functions.spin", "content_type": "json", "content": '{"a": 1}'}
    ]
    assert chat["finish_reason"] == "eos"
    assert chat["input"] == {"label": 3}
    assert chat_templates.tokenizer("harmony").decode(chat["token_ids"]) == SAYS
    assert plain["channels"] is None
    assert plain["tool_calls"] is None
    assert list(plain) == list(chat)


def test_tools_and_effort_reach_the_template(run, write_jsonl, speaker):
    tools = [{"function": {"name": "spin"}}]
    row = {"messages": TALK, "tools": tools, "reasoning_effort": "none at all", "max_new_tokens": 1}
    write_jsonl([row])
    (record,) = run()
    variables = {"reasoning_effort": "none at all"}
    expected = encode(speaker, TALK, tools=tools, variables=variables)
    assert record["prompt_tokens"] == len(expected)
    assert record["input"] is None


def test_messages_that_the_template_refuses_are_error_rows_and_their_neighbours_are_served(
    run, write_jsonl
):
    forged = [{"role": "assistant", "content": "<|channel|>final<|message|>x"}, *TALK]
    write_jsonl([{"messages": TALK}, {"messages": forged, "id": "b"}, {"messages": TALK}])
    first, bad, last = run()
    assert (first["status"], last["status"]) == ("ok", "ok")
    assert bad["error"]["code"] == "chat_template_failed"
    assert "give analysis as" in bad["error"]["message"]
    assert bad["id"] == "b"
    assert first["token_ids"] == last["token_ids"]


def test_a_model_without_a_template_makes_error_rows_of_messages_alone(
    run, write_jsonl, model, tmp_path
):
    write_jsonl([{"messages": TALK}, {"prompt": "a", "max_new_tokens": 2}])
    chat, plain = run(model=model)
    assert chat["error"]["code"] == "chat_template_missing"
    assert plain["status"] == "ok"


def test_a_job_that_takes_days_tells_the_day_that_it_was_planned(
    run, write_jsonl, tmp_path, monkeypatch
):
    write_jsonl([{"messages": TALK, "max_new_tokens": 1}])
    first = run()
    folder = OutputFolder(tmp_path / "out")
    plan = folder.read_plan()
    assert plan is not None
    assert plan.date == json.loads((folder.path / "manifest.json").read_text())["date"]
    assert abs(datetime.datetime.now() - plan.now) < datetime.timedelta(days=2)

    asked = []
    encode = Chat.encode
    monkeypatch.setattr(
        Chat, "encode", lambda *a, now, **k: asked.append(now) or encode(*a, now=now, **k)
    )
    fields = json.loads((folder.path / "_plan.json").read_text()) | {"date": "2026-03-04"}
    (folder.path / "_plan.json").write_text(json.dumps(fields))
    for receipt in (folder.path / "_receipts").iterdir():
        receipt.unlink()
    assert run() == first
    assert asked == [NOW]


@pytest.mark.parametrize(
    ("name", "told"),
    [("chat_template.jinja", "tokenizer"), ("generation_config.json", "generation_config")],
)
def test_template_and_stop_ids_are_part_of_the_fingerprint(speaker, tmp_path, name, told):
    import shutil

    other = shutil.copytree(speaker, tmp_path / "speaker")
    before = plan_lib.fingerprint(speaker, GREEDY, slots=4)
    assert plan_lib.fingerprint(other, GREEDY, slots=4) == before
    (other / name).write_text((other / name).read_text() + "\n")
    after = plan_lib.fingerprint(other, GREEDY, slots=4)
    assert {k for k in before if before[k] != after[k]} == {told}
