"""Chat templates of three families, written for the tests, and tokenizers that know their special tokens."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from core.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{% generation %}{{ message['content'] | trim }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA = r"""{{- bos_token }}
{%- set ns = namespace(date=strftime_now("%d %b %Y")) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + ns.date + "\n\n" + system + eos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if tools is not none and loop.first %}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) }}
            {%- if loop.last %}{% break %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# What gpt-oss's own says, for conversations and function calls; its rendering of JSON schemas is left out.
HARMONY = r"""{%- macro system() -%}
    {{- "You are ChatGPT, a large language model trained by OpenAI.\n" -}}
    {{- "Knowledge cutoff: 2024-06\nCurrent date: " ~ strftime_now("%Y-%m-%d") ~ "\n\n" -}}
    {{- "Reasoning: " ~ (reasoning_effort or "medium") ~ "\n\n" -}}
    {{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." -}}
    {%- if tools %}{{- "\nCalls to these tools must go to the commentary channel: 'functions'." }}{%- endif -%}
{%- endmacro -%}
{%- macro said(channel, text, end="<|end|>") -%}
    {{- "<|start|>assistant<|channel|>" ~ channel ~ "<|message|>" ~ text ~ end -}}
{%- endmacro -%}
{{- "<|start|>system<|message|>" ~ system() ~ "<|end|>" }}
{%- set turns = messages %}
{%- if messages[0].role in ("system", "developer") %}
    {{- "<|start|>developer<|message|># Instructions\n\n" ~ messages[0].content ~ "<|end|>" }}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in turns %}
    {%- if "<|channel|>final<|message|>" in (message.content or "") and message.role == "assistant" %}
        {{- raise_exception("give analysis as 'thinking' and the final message as 'content'") }}
    {%- endif %}
    {%- if message.role == "user" %}
        {{- "<|start|>user<|message|>" ~ message.content ~ "<|end|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start|>functions." ~ called.name ~ " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson ~ "<|end|>" }}
    {%- elif message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {%- set called.name = call.name %}
        {%- if message.thinking %}{{- said("analysis", message.thinking) }}{% endif %}
        {{- "<|start|>assistant to=functions." ~ call.name ~ "<|channel|>commentary json<|message|>" }}
        {{- call.arguments | tojson ~ "<|call|>" }}
    {%- elif loop.last and not add_generation_prompt %}
        {%- if message.thinking %}{{- said("analysis", message.thinking) }}{% endif %}
        {{- said("final", message.content, "<|return|>") }}
    {%- else %}
        {{- said("final", message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "harmony": HARMONY}

SPECIAL = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "harmony": (
        *("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
        "<|call|>",
    ),
}
NAMED = {
    "chatml": {"eos_token": "<|im_end|>"},
    "llama": {
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "eos_token": "<|eot_id|>",
    },
    "harmony": {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
}


def tokenizer(family: str) -> Tokenizer:
    """Bytes, <|endoftext|>, and then the family's special tokens."""
    backend = tokenizers.Tokenizer.from_str(Tokenizer.utf8().files()["tokenizer.json"].decode())
    backend.add_special_tokens(list(SPECIAL[family]))
    eos = NAMED[family]["eos_token"]
    assert isinstance(eos, str)
    return Tokenizer(backend, eos=eos)


def write(folder: Path, family: str, *, template: str | None = None, **settings: Any) -> Tokenizer:
    """Writes the tokenizer files and the template into `folder`, as a checkpoint has them beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(family)
    named = {"tokenizer_class": "PreTrainedTokenizerFast"} | NAMED[family] | settings
    (folder / "tokenizer.json").write_bytes(made.files()["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if "chat_template" not in settings:
        (folder / "chat_template.jinja").write_text(
            TEMPLATES[family] if template is None else template
        )
    return made
