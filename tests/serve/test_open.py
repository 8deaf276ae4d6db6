"""What a server opens: encoders, composites with their parts, and faults with the model's name."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from server_help import greedy, moved, tiny, tokenizer  # type: ignore[import-not-found]
from serving import background, openai  # type: ignore[import-not-found]

from pluribus.core.errors import MissingError
from pluribus.serve import of, open_all


@pytest.fixture
def place(tmp_path):
    base = tiny(1)
    for name, model in {"base": base, "expert": moved(base, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_an_encoder_makes_embeddings(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=330, num_hidden_layers=2, **sizes)).eval()
    model.save_pretrained(tmp_path / "reader")
    tokenizer().save_pretrained(tmp_path / "reader")
    texts = ["a fine and funny film", "no", "Question: How far"]
    with (
        background(open_all(of(tmp_path / "reader"))) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        got = client.embeddings.create(model="reader", input=texts)
        for one, text in zip(got.data, texts, strict=True):
            ids = torch.tensor([tokenizer()(text)["input_ids"]])
            with torch.no_grad():
                mean = model(ids).last_hidden_state[0].mean(0)
            expected = torch.nn.functional.normalize(mean, dim=0)
            torch.testing.assert_close(torch.tensor(one.embedding), expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(openai.BadRequestError, match="only makes embeddings"):
            client.completions.create(model="reader", prompt="a")


def test_a_composite_beside_its_parts(place):
    """A saved composite answers as its router says, and each part alone as its checkpoint."""
    from pluribus.route import fit_router, from_checkpoints

    paths = {"one": place / "expert", "two": place / "base"}
    torch.manual_seed(0)
    routed = from_checkpoints(tiny(1), place / "base", paths, density=1.0, features="hidden")
    inputs = {
        "one": [{"input_ids": torch.randint(5, 150, (8, 9))} for _ in range(2)],
        "two": [{"input_ids": torch.randint(150, 300, (8, 9))} for _ in range(2)],
    }
    fit_router(routed, inputs, kind="linear", epochs=5)
    routed.save(place / "mixed")
    tokenizer().save_pretrained(place / "mixed" / "base")
    members = open_all(of(place / "mixed"))
    assert list(members) == ["mixed", "mixed:one", "mixed:two"]
    assert members["mixed"].engine is members["mixed:one"].engine
    ids = [20, 30, 40, 50]
    with (
        background(members) as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        asked = {"prompt": ids, "max_tokens": 6, "temperature": 0}
        found = {
            name: client.completions.create(model=name, **asked).choices[0].text for name in members
        }
    words = tokenizer()
    weights = routed.route(input_ids=torch.tensor([ids]))
    whole = routed.generate(
        torch.tensor([ids]), weights=weights, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert found["mixed"] == words.decode(whole[0, len(ids) :], skip_special_tokens=True)
    for name, model in {"mixed:one": moved(tiny(1), 2), "mixed:two": tiny(1)}.items():
        expected = [i for i in greedy(model, ids, 6) if i != 0]
        assert found[name] == words.decode(expected, skip_special_tokens=True)


def test_faults_name_the_model_and_close_the_others(place):
    import threading

    (place / "server.yml").write_text("models: {good: base, bad: nowhere}\n")
    with pytest.raises(MissingError, match=r"models\.bad: .*nowhere"):
        open_all(of(place / "server.yml"))
    assert not [t for t in threading.enumerate() if t.name.startswith("pluribus")]
