"""`pluribus generate`: streamed text, tokens and weights, a page; and what is refused."""

import sys
from pathlib import Path

import pytest

from pluribus.decode import Fused, SpeculativeDecoder
from pluribus.decode.stack import build, open_reference, read

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import moved, tiny, tokenizer  # type: ignore[import-not-found]

STACK = """models: {large: lm-large, base: lm-small, expert: lm-expert}
fuser: {kind: logits_fusion}
"""
PROMPT = "Review: a fine film"


@pytest.fixture
def where(place):
    base = tiny(1, positions=64)
    members = {"large": tiny(0, positions=64), "small": base, "expert": moved(base, 2)}
    for name, model in members.items():
        model.save_pretrained(place / f"lm-{name}")
        tokenizer().save_pretrained(place / f"lm-{name}")
    (place / "stack.yml").write_text(STACK)
    return place


def test_a_stack_writes_what_it_writes_in_python(cli, where):
    fused, words = build(read(where / "stack.yml"))
    out = fused.generate(
        **fused.encode(PROMPT), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )
    new = out.sequences[0, len(words(PROMPT)["input_ids"]) :].tolist()
    expected = words.decode(new, skip_special_tokens=True)
    told = cli("generate", "stack.yml", PROMPT, "--max-new-tokens", "9", "--json").json
    kept = [one["id"] for one in told["tokens"]]
    assert kept == (new[:-1] if told["ended"] else new)
    assert told["text"] == expected
    for i, one in enumerate(told["tokens"]):
        assert one["weights"] == {
            "expert": pytest.approx(float(out.fusion_weights["expert"][0, i]))
        }
        assert one["token"] == words.decode([one["id"]])
    text = cli("generate", "stack.yml", PROMPT, "--max-new-tokens", "9")
    assert text.out == expected + "\n"
    assert text.err == ""
    assert cli("generate", "stack.yml", PROMPT, "--max-new-tokens", "9", "--quiet") == text


def test_a_saved_one_and_a_plain_model(cli, where):
    stacked = cli("generate", "stack.yml", PROMPT, "--max-new-tokens", "9", "--json").json
    build(read(where / "stack.yml")).model.save_pretrained(where / "saved")
    saved = cli("generate", "saved", PROMPT, "--max-new-tokens", "9", "--json").json
    assert saved == stacked
    plain = cli("generate", "lm-large", PROMPT, "--max-new-tokens", "9", "--json").json
    assert all(one["weights"] == {} for one in plain["tokens"])
    model, words = open_reference("lm-large")
    given = words(PROMPT, return_tensors="pt")
    made = model.generate(given["input_ids"], max_new_tokens=9, do_sample=False)
    assert plain["text"] == words.decode(
        made[0, given["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_chance_is_the_seeds(cli, where):
    drawn = [
        cli(
            "generate",
            "stack.yml",
            PROMPT,
            "--max-new-tokens",
            "9",
            "--temperature",
            "1",
            "--seed",
            seed,
        ).out
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_page_with_weights(cli, where):
    cli("generate", "stack.yml", PROMPT, "--max-new-tokens", "5", "--html", "page.html")
    page = (where / "page.html").read_text()
    assert "Weight of each role" in page
    assert "DynamicFusion(" in page
    assert '<th scope="col" class="n">expert</th>' in page
    cli("generate", "lm-large", PROMPT, "--max-new-tokens", "5", "--html", "plain.html")
    assert "Weight of each role" not in (where / "plain.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stack.yml", ""), "makes no tokens"),
        (("stack.yml", PROMPT, "--max-new-tokens", "64"), "more than the 64 that"),
        (("lm-large", PROMPT, "--max-new-tokens", "64"), "more than the 64 that the model takes"),
        (("stak.yml", PROMPT), "no such stack"),
        (("ties.yml", PROMPT), "is no stack"),
        (("nowhere", PROMPT), "nowhere"),
        (("base", PROMPT), "config.json"),
        (("stack.yml", PROMPT, "--device", "tpu9"), "expected cpu, cuda or cuda:N"),
        (("stack.yml", PROMPT, "--html", "no/page.html"), "no such folder to write a page into"),
    ],
)
def test_what_is_refused(refused, where, arguments, said):
    assert said in refused("generate", *arguments)


def test_fusers_that_do_not_fit(refused, where):
    (where / "stack.yml").write_text(STACK.replace("logits_fusion", "logit_fusion"))
    assert "Did you mean 'logits_fusion'" in refused("generate", "stack.yml", PROMPT)
    (where / "stack.yml").write_text(STACK.replace("fuser:", "fuse:"))
    assert "is no stack" in refused("generate", "stack.yml", PROMPT)


def test_help_has_an_example(cli):
    told = cli("generate", "--help").out
    assert "Example: pluribus generate stack.yml" in told


def test_a_stack_is_drafted_for(where):
    fused: Fused = build(read(where / "stack.yml")).model
    inputs = fused.encode(PROMPT)
    plain = fused.generate(**inputs, max_new_tokens=9, do_sample=False)
    drafted = SpeculativeDecoder(fused, "large").generate(inputs["input_ids"], max_new_tokens=9)
    assert drafted.sequences.tolist() == plain.tolist()
