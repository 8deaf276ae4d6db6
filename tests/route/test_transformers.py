"""Composites of language models: PEFT's logits, beams, pipelines; served by transformers."""

import sys
from pathlib import Path

import pytest
import torch

from pluribus.core.errors import InputError, MismatchError, OutputError
from pluribus.core.optional import optional
from pluribus.route import Dense, Routed, fit_router, from_adapters, from_checkpoints, to_peft

sys.path.insert(
    0, str(Path(__file__).parents[1] / "tasks")
)  # tests are collected without a package
from tiny_model import model, tokenizer  # type: ignore[import-not-found]

peft = optional("peft", "hf", "to compare with")
pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.fixture
def adapters(tmp_path_factory):
    """Three PEFT LoRAs of different ranks, scales and targets, with weights that do something."""
    root = tmp_path_factory.mktemp("adapters")
    settings = {
        "maths": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "code": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
        "chat": {"r": 3, "lora_alpha": 9, "target_modules": ["up_proj"], "use_rslora": True},
    }
    for number, (name, given) in enumerate(settings.items()):
        made = peft.get_peft_model(model(), peft.LoraConfig(**given))
        torch.manual_seed(number)
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(root / name)
    return {name: root / name for name in settings}


@pytest.fixture
def routed(adapters):
    return from_adapters(model(), adapters, features="hidden")


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(5, 300, (rows, 9), generator=torch.Generator().manual_seed(0))


def test_logits_are_pefts(adapters, routed):
    names = ["code", "maths", "chat", "code"]
    with torch.no_grad():
        found = routed(ids(), weights=names).logits
        for row, name in enumerate(names):
            alone = peft.PeftModel.from_pretrained(model(), adapters[name]).eval()
            expected = alone(ids()[row : row + 1]).logits[0]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_a_part_goes_back_to_peft(routed, tmp_path):
    for name in routed.names:
        to_peft(routed, name, tmp_path / name)
        again = peft.PeftModel.from_pretrained(model(), tmp_path / name).eval()
        with torch.no_grad():
            expected = routed(ids(), weights=name).logits
            torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(OutputError, match="holds an adapter already"):
        to_peft(routed, "code", tmp_path / "code")
    plain = Routed(torch.nn.Linear(2, 2), {"a": {"weight": Dense(torch.ones(2, 2))}})
    with pytest.raises(InputError, match="low-rank deltas of module weights, not weight"):
        to_peft(plain, "a", tmp_path / "a")


def test_a_cache_goes_on_in_the_batchs_order(routed):
    names = ["code", "maths", "chat", "code"]
    with torch.no_grad():
        whole = routed(ids(), weights=names).logits
        first = routed(ids()[:, :6], weights=names, use_cache=True)
        key = "cache" if "cache" in first else "past_key_values"  # as this transformers calls it
        rest = routed(ids()[:, 6:], weights=names, **{key: first[key]}).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_mixture_is_the_merge(routed):
    shares = {"maths": 0.7, "chat": -0.2}
    merged = model()
    merged.load_state_dict(routed.materialise(shares))
    with torch.no_grad():
        expected = merged(ids()).logits
        torch.testing.assert_close(
            routed(ids(), weights=shares).logits, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_each_models_own(adapters, routed, beams):
    names = ["chat", "code", "maths"]
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    prompt = ids(3)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0  # padded on the left
    found = routed.generate(input_ids=prompt, attention_mask=mask, weights=names, **settings)
    for row, name in enumerate(names):
        alone = peft.PeftModel.from_pretrained(model(), adapters[name]).eval()
        start = 4 if row == 1 else 0
        one = alone.generate(input_ids=prompt[row : row + 1, start:], **settings)[0]
        written = found[row, start:]
        assert torch.equal(written[: len(one)], one)


def test_a_router_by_hidden_states_and_a_saved_composite(routed, tmp_path):
    rng = torch.Generator().manual_seed(1)
    ranges = {"maths": (5, 100), "code": (100, 200), "chat": (200, 300)}
    inputs = {
        name: [{"input_ids": torch.randint(*span, (16, 24), generator=rng)} for _ in range(6)]
        for name, span in ranges.items()
    }
    told = fit_router(routed, inputs, kind="linear", epochs=60, lr=2e-2)
    assert told.accuracy > 0.6
    prompt = torch.cat([batch[0]["input_ids"][:1] for batch in inputs.values()])
    expected = routed(prompt)
    routed.save(tmp_path / "composite")
    again = Routed.load(tmp_path / "composite")
    assert torch.equal(again(prompt).logits, expected.logits)
    chosen = [routed.names[i] for i in routed.route(prompt).argmax(1)]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    routed.top_k = again.top_k = 1
    assert torch.equal(
        again.generate(prompt, **settings), routed.generate(prompt, weights=chosen, **settings)
    )


def test_a_plain_pipeline_serves_it(routed):
    from transformers import TextGenerationPipeline

    writer = TextGenerationPipeline(model=routed, tokenizer=tokenizer())
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    [told] = writer("Review: a fine film", weights="code", **settings)
    words = tokenizer()("Review: a fine film", return_tensors="pt")
    written = routed.generate(**words, weights="code", max_new_tokens=6, do_sample=False)
    expected = tokenizer().decode(
        written[0, words["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert told["generated_text"] == expected


def test_parts_of_whole_checkpoints_and_a_tied_embedding(tmp_path):
    base = model()
    state = {n: t.clone() for n, t in base.state_dict().items() if n != "lm_head.weight"}
    torch.manual_seed(3)
    experts = {name: {n: t + 0.05 * torch.randn_like(t) for n, t in state.items()} for name in "ab"}
    for name, tensors in {"base": state, **experts}.items():
        one = model()
        one.load_state_dict(tensors, strict=False)
        one.save_pretrained(tmp_path / name)
    paths = {name: tmp_path / name for name in experts}
    routed = from_checkpoints(model(), tmp_path / "base", paths, density=1.0)
    with torch.no_grad():
        for _ in range(2):
            found = routed(ids(2), weights=["b", "a"]).logits
            for row, name in enumerate("ba"):
                expert = type(base).from_pretrained(tmp_path / name)
                expected = expert(ids(2)[row : row + 1]).logits[0]
                torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


def test_bad_input(adapters, routed, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=330))
    with pytest.raises(MismatchError, match="part maths: the base has no tensor"):
        from_adapters(other, {"maths": adapters["maths"]})
    plain = Routed(torch.nn.Linear(2, 2), {"a": {"weight": Dense(torch.ones(2, 2))}})
    with pytest.raises(InputError, match="Linear cannot generate"):
        plain.generate(ids())
    with pytest.raises(InputError, match="there is no router yet"):
        routed.generate(ids())
