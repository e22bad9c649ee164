"""`python -m core.generate --chat` from the outside, with models that say what they are told to."""

import datetime
import json
import subprocess
import sys

import pytest

import chat_templates
import scripted
from core.chat import Chat

SAYS = (
    "<|channel|>analysis<|message|>The user é😀.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Flax, é😀!<|return|>"
)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|end|>"}]
ASKED = ["--system=Be brief.", "--prompt=Hi <|end|>", "--temperature=0", "--max_new_tokens=200"]


def prompt_ids(folder, family, talk, **variables):
    folder.mkdir()
    chat = Chat.open(folder, chat_templates.write(folder, family))
    return chat.encode(talk, now=datetime.datetime.now(), variables=variables)


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ids = prompt_ids(folder / "files", "harmony", TALK, reasoning_effort="medium")
    scripted.write(folder / "model", "harmony", says=SAYS, after=len(ids))
    return folder / "model"


def generate(model, *arguments, code=0):
    command = [sys.executable, "-m", "core.generate", f"--model={model}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("more", [[], ["--stop=!"]], ids=["streamed", "with a stop string"])
def test_the_final_channel_is_printed_and_the_others_are_told_apart(harmony, more):
    done = generate(harmony, "--chat", *ASKED, *more)
    assert done.stdout == ("Flax, é😀\n" if more else "Flax, é😀!\n")
    assert done.stderr == "\n[analysis] The user é😀."


def test_a_record_has_the_conversation_the_channels_and_what_the_model_said(harmony, tmp_path):
    arguments = ["--chat", "--json", *ASKED, "--reasoning_effort=higher"]
    record = json.loads(generate(harmony, *arguments[:-1]).stdout)
    tokenizer = chat_templates.tokenizer("harmony")
    assert record["messages"] == TALK
    assert record["prompt_tokens"] == prompt_ids(tmp_path / "a", "harmony", TALK)
    assert tokenizer.decode(record["tokens"]) == SAYS
    assert record["finish_reason"] == "eos"
    assert record["text"] == "Flax, é😀!"
    assert record["channels"] == {"analysis": "The user é😀.", "final": "Flax, é😀!"}
    assert record["tool_calls"] == []
    told = json.loads(generate(harmony, *arguments).stdout)
    effort = prompt_ids(tmp_path / "b", "harmony", TALK, reasoning_effort="higher")
    assert told["prompt_tokens"] == effort


@pytest.mark.slow
def test_a_model_without_channels_just_answers(tmp_path):
    ids = prompt_ids(tmp_path / "files", "chatml", TALK)
    scripted.write(tmp_path / "m", "chatml", says="Flax, é😀!<|im_end|>", after=len(ids))
    assert generate(tmp_path / "m", "--chat", *ASKED).stdout == "Flax, é😀!\n"


def test_a_model_without_a_template_is_told_in_one_line(tmp_path):
    scripted.write(tmp_path / "m", "chatml", says="", after=1, chat_template=None)
    done = generate(tmp_path / "m", "--chat", "--prompt=a", code=1)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "has no chat template" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt=a", "--system=b"],
        ["--prompt=a", "--reasoning_effort=low"],
        ["--chat", "--prompt_tokens=1"],
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_is_opened(arguments):
    assert "--chat" in generate("nowhere", *arguments, code=2).stderr
