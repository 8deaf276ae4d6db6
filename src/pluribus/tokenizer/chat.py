r"""Chat templates: the built-in ones, the one most inputs share, or one given as Jinja text.

What the built-in templates write for a system prompt S, user turns U1 U2 and an answer A1:

    chatml   <|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n ...
    llama3   <|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|> ...
    mistral  <s> [INST] S\n\nU1 [/INST] A1</s> [INST] U2 [/INST]
    alpaca   S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction: ...
    exaone   [|system|]S[|endofturn|]\n[|user|]U1\n[|assistant|]A1[|endofturn|]\n ...

where <s>, </s> and <|begin_of_text|> stand for the tokenizer's own bos and eos tokens. All dashes
are explicit, so that the text does not depend on Jinja's trim options.

The names are those of mergekit 0.1.5, whose chatml and mistral texts are the same. Its llama3 has a
line break after each <|eot_id|> and its exaone stray indentation, neither of which the models were
trained on; its alpaca has no end-of-sequence token and no blank line before the last response.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pluribus.core.errors import nearest
from pluribus.tokenizer.errors import TokenizerError

CHATML = """\
{%- for turn in messages -%}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' -}}
    {{- turn.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# The first version of the format, with the spaces Mistral documents for it. There is no system
# role: the prompt opens the first instruction.
MISTRAL = """\
{{- bos_token -}}
{%- set ns = namespace(system='', due='user') -%}
{%- for turn in messages -%}
    {%- if turn.role == 'system' and loop.first -%}
        {%- set ns.system = turn.content ~ '\\n\\n' -%}
    {%- elif turn.role != ns.due -%}
        {{- raise_exception('expected a turn of ' ~ ns.due ~ ', not ' ~ turn.role) -}}
    {%- elif turn.role == 'user' -%}
        {{- ' [INST] ' ~ ns.system ~ turn.content ~ ' [/INST]' -}}
        {%- set ns.system = '' -%}
        {%- set ns.due = 'assistant' -%}
    {%- else -%}
        {{- ' ' ~ turn.content ~ eos_token -}}
        {%- set ns.due = 'user' -%}
    {%- endif -%}
{%- endfor -%}
"""

ALPACA = """\
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}
        {{- '### Instruction:\\n' ~ turn.content ~ '\\n\\n' -}}
    {%- elif turn.role == 'assistant' -%}
        {{- '### Response:\\n' ~ turn.content ~ eos_token ~ '\\n\\n' -}}
    {%- else -%}
        {{- turn.content ~ '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

# A conversation without a system prompt starts with an empty one.
EXAONE = """\
{%- for turn in messages -%}
    {%- if loop.first and turn.role != 'system' -%}
        {{- '[|system|][|endofturn|]\\n' -}}
    {%- endif -%}
    {{- '[|' ~ turn.role ~ '|]' ~ turn.content -}}
    {{- '\\n' if turn.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
"""

BUILTIN = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}


def chat_template(wanted: str, inputs: Iterable[str | None] = ()) -> str | None:
    """Return the Jinja text for a name, `auto`, or Jinja text itself.

    `auto` is the template most of the inputs share, the earliest of equals; None if none has one.
    Raises TokenizerError for text that is neither a known name nor a template.
    """
    if wanted == "auto":
        found = Counter(text.strip() for text in inputs if text and text.strip())
        return found.most_common(1)[0][0] if found else None
    if wanted in BUILTIN:
        return BUILTIN[wanted]
    if len(wanted) < 20 or "{" not in wanted:
        names = ["auto", *BUILTIN]
        raise TokenizerError(
            f"chat_template {wanted!r} is not a template: expected one of {', '.join(names)}, or "
            f"Jinja text.{nearest(wanted, names)}"
        )
    return wanted


def read_chat_template(folder: str | os.PathLike[str]) -> str | None:
    """Return the (default) chat template of a tokenizer folder, or None."""
    folder = Path(folder)
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = _default(_read(folder / name).get("chat_template"))
            if template is not None:
                return template
    return None


def write_chat_template(folder: str | os.PathLike[str], template: str) -> None:
    """Make this the chat template of a tokenizer folder.

    It goes to chat_template.jinja, which new readers prefer, and to tokenizer_config.json, the only
    place old readers look.
    """
    folder = Path(folder)
    _write(folder / "chat_template.jinja", template)
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    values = _read(path) if path.is_file() else {}
    values["chat_template"] = template
    _write(path, json.dumps(values, ensure_ascii=False, indent=2) + "\n")


def _default(template: Any) -> str | None:
    if isinstance(template, list):  # [{"name": ..., "template": ...}]
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
