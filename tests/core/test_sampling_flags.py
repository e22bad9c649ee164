import os
import subprocess
import sys
from pathlib import Path

import pytest

# Flags belong to a process, so each test has its own.
SETTLE = "import sys; from absl import flags; flags.FLAGS(sys.argv); "


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_flags_that_are_not_given_are_the_defaults_of_sampling():
    compare = "import core; assert sampling_flags.sampling() == core.Sampling()"
    done = python(f"from core import sampling_flags; {SETTLE}{compare}")
    assert done.returncode == 0, done.stderr


def test_every_parameter_of_sampling_has_its_flag():
    given = {
        "temperature": "0.5",
        "top_k": "7",
        "top_p": "0.75",
        "min_p": "0.25",
        "repetition_penalty": "1.5",
        "presence_penalty": "-0.5",
        "frequency_penalty": "0.25",
        "bad_ids": "5,4",
        "allowed_ids": "1, 2,5",
        "min_new_tokens": "2",
        "max_new_tokens": "9",
        "stop": "END",
        "seed": "3",
        "ignore_eos": "true",
    }
    done = python(
        f"from core import sampling_flags; {SETTLE}print(sampling_flags.sampling(logprobs=2))",
        *(f"--{name}={value}" for name, value in given.items()),
        "--logit_bias=7:-100",
        "--logit_bias=3:0.5",
    )
    assert done.stdout == (
        "Sampling(temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, repetition_penalty=1.5, "
        "presence_penalty=-0.5, frequency_penalty=0.25, logit_bias=((3, 0.5), (7, -100.0)), "
        "bad_ids=(4, 5), allowed_ids=(1, 2, 5), min_new_tokens=2, "
        "max_new_tokens=9, stop=('END',), seed=3, ignore_eos=True, logprobs=2)\n"
    ), done.stderr


def test_ids_and_biases_that_cannot_be_are_wrong_usage():
    told = {
        "--logit_bias=7": "--logit_bias=7 is no token id and bias; expected such as --logit_bias=",
        "--logit_bias=a:1": "--logit_bias=a:1 is no token id and bias; expected such as --logit",
        "--logit_bias=7:nan": "--logit_bias of 7 is nan; expected a float, from -100 to 100",
        "--bad_ids=1,x": "--bad_ids=1,x is no list of token ids: invalid literal for int()",
        "--allowed_ids=-1": "--allowed_ids holds -1; expected token ids, 0 or more",
        "--min_new_tokens=51": "--min_new_tokens is 51; expected int, 0 or more, at most max_new",
    }
    code = """import sys; from absl import flags; from core import door, sampling_flags
for argument in sys.argv[1:]:
    flags.FLAGS(["", argument])
    try:
        sampling_flags.sampling()
    except door.Usage as error:
        print(error)
    flags.FLAGS[argument.split("=")[0].lstrip("-")].unparse()
"""
    done = python(code, *told)
    found = done.stdout.splitlines()
    assert len(found) == len(told), done.stderr
    for line, start in zip(found, told.values(), strict=True):
        assert line.startswith(start)


def test_a_prompt_that_cannot_be_read_is_one_line(tmp_path: Path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    command = [sys.executable, "-m", "core.generate", "--model=nowhere"]
    for flag, stdin, code, told in (
        (f"--prompt_tokens=FILE:{deep}", b"", 2, "is no list of token ids: maximum recursion"),
        ("--prompt=-", b"\xff", 1, "error: the prompt on stdin cannot be read: 'utf-8' codec"),
    ):
        done = subprocess.run(
            [*command, flag],
            input=stdin,
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )
        lines = done.stderr.decode().splitlines()
        assert (done.returncode, len(lines)) == (code, 1)
        assert told in lines[0]


@pytest.mark.parametrize(
    "door",
    [
        ["core.generate", "--model=nowhere", "--prompt=a"],
        ["serve_batch", "--model=nowhere", "--input=nothing", "--output=nowhere"],
    ],
)
def test_both_doors_have_them_and_a_value_that_cannot_be_is_wrong_usage(door):
    done = subprocess.run(
        [sys.executable, "-m", *door, "--top_p=2"], capture_output=True, text=True, check=False
    )
    told = "error: --top_p is 2.0; expected float, above 0, at most 1 (off); --help lists the flags"
    assert (done.returncode, done.stderr) == (2, told + "\n")
    shown = subprocess.run(
        [sys.executable, "-m", door[0], "--help"], capture_output=True, text=True, check=False
    )
    assert "--max_new_tokens" in shown.stdout + shown.stderr
