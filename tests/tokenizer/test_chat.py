import json

import pytest

from pluribus.tokenizer import (
    TokenizerError,
    chat_template,
    read_chat_template,
    write_chat_template,
)

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nOne? [/INST] Two.</s> [INST] Three? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nTwo.</s>\n\n"
    "### Instruction:\nThree?\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]One?\n[|assistant|]Two.[|endofturn|]\n"
    "[|user|]Three?\n[|assistant|]",
}


def render(template, turns=TURNS, trim=True, prompt=True):
    jinja2 = pytest.importorskip("jinja2")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
    env.globals["raise_exception"] = raise_exception
    return env.from_string(template).render(
        messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt
    )


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_two_turns_by_hand(name, trim):
    assert render(chat_template(name), trim=trim) == EXPECTED[name]


@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca", "exaone"])
def test_generation_prompt_only_when_asked(name):
    assert EXPECTED[name].startswith(render(chat_template(name), prompt=False))
    assert render(chat_template(name), prompt=False) != EXPECTED[name]


def test_without_a_system_prompt():
    assert render(chat_template("mistral"), TURNS[1:]).startswith("<s> [INST] One? [/INST]")
    assert render(chat_template("exaone"), TURNS[1:]).startswith(
        "[|system|][|endofturn|]\n[|user|]"
    )


def test_mistral_turns_must_alternate():
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(jinja2.TemplateError, match="expected a turn of assistant, not user"):
        render(chat_template("mistral"), [TURNS[1], TURNS[3]])


def test_transformers_renders_the_same(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    for path in folders["base"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, expected in EXPECTED.items():
        write_chat_template(tmp_path, chat_template(name))
        tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = tok.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        assert text == expected


def test_auto_is_the_most_common_and_the_first_of_equals():
    assert chat_template("auto", ["{{ a }}", None, "{{ b }}\n", " {{ b }}"]) == "{{ b }}"
    assert chat_template("auto", ["{{ b }}", "{{ a }}"]) == "{{ b }}"
    assert chat_template("auto", [None, " "]) is None


def test_jinja_text_is_taken_as_it_is():
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_template(text) == text


@pytest.mark.parametrize("wanted", ["chatlm", "{{ short }}", "no braces but more than twenty"])
def test_unknown_names_are_refused(wanted):
    with pytest.raises(TokenizerError, match="expected one of auto, alpaca, chatml"):
        chat_template(wanted)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(TokenizerError, match="Did you mean 'chatml'"):
        chat_template("chatlm")


def test_files(tmp_path):
    assert read_chat_template(tmp_path) is None
    write_chat_template(tmp_path, "{{ x }}")
    assert read_chat_template(tmp_path) == "{{ x }}"
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"
    )
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "d"
