"""`Fused` as a language model: generation in all its ways, caches, prompts, scores, weights."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from pluribus.core.optional import optional
from pluribus.decode import (
    EFT,
    DynamicFusion,
    Fused,
    Product,
    StaticFusion,
    Unadapted,
    dial,
    upscale,
)
from pluribus.decode._cache import FusedCache

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
from members import ids, moved, tiny, tokenizer, trio  # type: ignore[import-not-found]

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def fused():
    return Fused(trio(), DynamicFusion())


def by_hand(fused, prompts, steps=8):
    """Greedy decoding, one row at a time and from the start at every step: no cache, no batch."""
    rows = []
    for prompt in prompts:
        text = {role: list(own) for role, own in prompt.items()}
        new = []
        for _ in range(steps):
            with torch.no_grad():
                logits = {
                    role: fused.members_by_role[role].runs(torch.tensor([own])).logits[:, -1]
                    for role, own in text.items()
                }
            token = int(fused.fuser(logits).log_probs.argmax())
            new.append(token)
            for own in text.values():
                own.append(token)
            if token == 0:
                break
        rows.append(new)
    return rows


def same(found, rows, start):
    for row, expected in zip(found[:, start:].tolist(), rows, strict=True):
        assert row[: len(expected)] == expected
        assert not any(row[len(expected) :])


def padded(rows):
    width = max(map(len, rows))
    made = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": made, "attention_mask": mask}


# -- one model -------------------------------------------------------------------------------------


def test_logits_are_the_fusers_and_weights_come_along(fused):
    with torch.no_grad():
        out = fused(ids())
        logits = {role: m.runs(ids()).logits for role, m in fused.members_by_role.items()}
    assert out.logits.dtype == torch.float32
    for at in (0, 4, 8):
        made = fused.fuser({role: x[:, at] for role, x in logits.items()})
        torch.testing.assert_close(out.logits[:, at], made.log_probs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.weights["expert"][:, at], made.weights["expert"])
    last = fused(ids(), logits_to_keep=2)
    torch.testing.assert_close(last.logits, out.logits[:, -2:], atol=1e-5, rtol=1e-5)
    assert last.weights["expert"].shape == (3, 2)
    whole = fused(ids(), return_dict=False)
    assert torch.equal(whole[0], fused(ids()).logits)


def test_rows_in_pieces_are_the_whole(fused, monkeypatch):
    expected = fused(ids()).logits
    monkeypatch.setattr("pluribus.decode._step.CHUNK", {"cpu": 330 * 4})
    torch.testing.assert_close(fused(ids()).logits, expected)


@pytest.mark.parametrize("fuser", [StaticFusion(alpha=0.5), DynamicFusion()])
def test_greedy_batches_are_the_rows_alone(fuser):
    fused = Fused(trio(), fuser)
    rows = [ids(1, 9)[0].tolist(), ids(1, 4, 1)[0].tolist(), ids(1, 6, 2)[0].tolist()]
    found = fused.generate(**padded(rows), **GREEDY)
    same(found, by_hand(fused, [dict.fromkeys(fused.roles, row) for row in rows]), 9)
    without = fused.generate(**padded(rows), **GREEDY, use_cache=False)
    assert torch.equal(found, without)


def test_a_cache_gives_what_reading_again_gives(fused):
    with torch.no_grad():
        whole = fused(ids()).logits
        first = fused(ids()[:, :5], use_cache=True)
        rest = fused(ids()[:, 5:], cache=first.cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)
    assert rest.cache.get_seq_length() == 9
    assert {r: c.get_seq_length() for r, c in rest.cache.members.items()} == dict.fromkeys(
        fused.roles, 9
    )
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = fused(ids(), attention_mask=mask).logits
        first = fused(ids()[:, :5], attention_mask=mask[:, :5], use_cache=True)
        rest = fused(ids()[:, 5:], attention_mask=mask, cache=first.cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)


def test_a_cache_is_cropped_copied_repeated_and_reordered(fused):
    with torch.no_grad():
        cache = fused(ids(), use_cache=True).cache
        other = copy.deepcopy(cache)
        other.crop(-4)
        assert (other.get_seq_length(), cache.get_seq_length()) == (5, 9)
        again = fused(ids()[:, 5:], cache=other).logits
        torch.testing.assert_close(again, fused(ids()).logits[:, 5:], atol=1e-4, rtol=1e-4)
        weights = fused(ids()).weights["expert"]
        torch.testing.assert_close(other.recorded()["expert"], weights)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        order = [0, 2, 2, 0]
        torch.testing.assert_close(cache.recorded()["expert"], weights[order])
        token = torch.tensor([[7]] * 4)
        found = fused(token, cache=cache).logits[:, 0]
        whole = fused(torch.cat((ids()[order], token), 1)).logits[:, -1]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_one_member_is_the_model_itself(settings):
    one = tiny(0)
    fused = Fused({"only": one}, Product())
    prompt = padded([ids(1, 9)[0].tolist(), ids(1, 5, 1)[0].tolist()])
    found = fused.generate(**prompt, **GREEDY, **settings)
    assert torch.equal(found, one.generate(**prompt, **GREEDY, **settings))
    torch.manual_seed(4)
    drawn = fused.generate(**prompt, **{**GREEDY, "do_sample": True}, temperature=0.7, top_k=20)
    torch.manual_seed(4)
    expected = one.generate(**prompt, **{**GREEDY, "do_sample": True}, temperature=0.7, top_k=20)
    assert torch.equal(drawn, expected)


def test_beams_are_those_without_a_cache(fused):
    prompt = padded([ids(1, 9)[0].tolist(), ids(1, 5, 1)[0].tolist()])
    settings = {**GREEDY, "num_beams": 3}
    found = fused.generate(**prompt, **settings)
    assert torch.equal(found, fused.generate(**prompt, **settings, use_cache=False))


def test_streaming_and_pipelines():
    from transformers import TextGenerationPipeline, TextStreamer

    words = tokenizer()
    fused = Fused(trio(), StaticFusion(), dict.fromkeys(("large", "base", "expert"), words))
    assert fused.vocabulary_checked
    text = "Review: a fine film"
    given = words(text, return_tensors="pt")
    given.pop("token_type_ids", None)
    expected = fused.generate(**given, **GREEDY)

    class Kept(TextStreamer):
        told = ""

        def on_finalized_text(self, text, stream_end=False):
            self.told += text

    streamer = Kept(words, skip_prompt=True)
    assert torch.equal(fused.generate(**given, **GREEDY, streamer=streamer), expected)
    new = expected[0, given["input_ids"].shape[1] :]
    assert streamer.told == words.decode(new)
    writer = TextGenerationPipeline(model=fused, tokenizer=words)
    [made] = writer(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert made["generated_text"] == words.decode(new, skip_special_tokens=True)


def test_transformers_own_assistant_drafts_for_it(fused):
    prompt = {"input_ids": ids(1), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    plain = fused.generate(**prompt, **GREEDY)
    helper = fused.members_by_role["expert"].runs
    assert torch.equal(fused.generate(**prompt, **GREEDY, assistant_model=helper), plain)


def test_loss_is_the_likelihood_of_what_was_read(fused):
    labels = ids()
    labels[0, :4] = -100
    out = fused(ids(), labels=labels)
    expected = [
        -out.logits[b, s - 1, labels[b, s]]
        for b in range(3)
        for s in range(1, 9)
        if labels[b, s] >= 0
    ]
    torch.testing.assert_close(out.loss, torch.stack(expected).mean())


def test_it_stays_in_eval_mode():
    members = trio(attention_dropout=0.5)
    members["large"].train()
    fused = Fused(members, StaticFusion())
    fused.train()
    assert not any(module.training for module in fused.modules())
    expected = fused(ids()).logits
    members["base"].train()  # behind its back
    assert torch.equal(fused(ids()).logits, expected)


# -- roles -----------------------------------------------------------------------------------------


def test_a_model_in_two_roles_is_kept_and_run_once():
    base = tiny(1)
    calls = []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    fused = Fused({"ref": base, "tuned": moved(base, 2), "base": base}, EFT())
    assert len(fused.members) == 2
    expected = fused.members_by_role["tuned"].runs(ids()).logits.log_softmax(-1)
    calls.clear()
    torch.testing.assert_close(fused(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
    other = {"base": {"input_ids": ids(3, 4, 5)}}  # now they read different prompts
    calls.clear()
    fused(ids(), member_inputs=other)
    assert len(calls) == 2


def test_n_equal_m_is_the_tuned_model():
    base = tiny(1)
    tuned = moved(base, 2)
    fused = Fused({"base": base, "tuned": tuned}, EFT(ref="base"))
    with torch.no_grad():
        expected = tuned(ids()).logits.log_softmax(-1)
        torch.testing.assert_close(fused(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(fused.generate(ids(), **GREEDY), tuned.generate(ids(), **GREEDY))


@pytest.mark.parametrize("beams", [1, 3])
def test_roles_with_prompts_of_their_own(beams):
    fused = Fused(trio(), DynamicFusion())
    main = [ids(1, 9)[0].tolist(), ids(1, 5, 1)[0].tolist()]
    own = [ids(1, 4, 2)[0].tolist(), ids(1, 7, 3)[0].tolist()]
    given = {"expert": padded(own)}
    found = fused.generate(**padded(main), **GREEDY, member_inputs=given, num_beams=beams)
    if beams == 1:
        prompts = [{"large": m, "base": m, "expert": o} for m, o in zip(main, own, strict=True)]
        same(found, by_hand(fused, prompts), 9)
    for row in range(2):  # beams have no slow version here: a row alone is one without padding
        alone = fused.generate(
            torch.tensor([main[row]]),
            attention_mask=torch.ones(1, len(main[row]), dtype=torch.long),
            **GREEDY,
            member_inputs={"expert": {"input_ids": torch.tensor([own[row]])}},
            num_beams=beams,
        )[0, len(main[row]) :]
        assert torch.equal(found[row, 9 : 9 + len(alone)], alone)
    plain = fused.generate(**padded(main), **GREEDY, num_beams=beams)
    assert not torch.equal(found, plain)


def test_scores_are_the_sums_of_forwards():
    words = tokenizer()
    fused = Fused(trio(), DynamicFusion(), dict.fromkeys(("large", "base", "expert"), words))
    prompt, ahead = ids(1, 6)[0].tolist(), ids(1, 4, 3)[0].tolist()
    told = fused.score(prompt, ahead)
    with torch.no_grad():
        logits = fused(torch.tensor([prompt + ahead])).logits[0]
    expected = torch.stack([logits[5 + i, token] for i, token in enumerate(ahead)])
    torch.testing.assert_close(told.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert told.total == pytest.approx(float(expected.sum()), abs=1e-4)
    alone = (
        fused.members_by_role["base"].runs(torch.tensor([prompt + ahead])).logits[0].log_softmax(-1)
    )
    torch.testing.assert_close(
        told.members["base"], torch.stack([alone[5 + i, t] for i, t in enumerate(ahead)])
    )
    own = {"expert": {"input_ids": torch.tensor([[9, 8, 7]])}}
    told = fused.score(prompt, ahead, member_inputs=own)
    for i in range(4):
        with torch.no_grad():
            text = {"large": prompt, "base": prompt, "expert": [9, 8, 7]}
            made = fused.fuser(
                {
                    role: fused.members_by_role[role]
                    .runs(torch.tensor([text[role] + ahead[:i]]))
                    .logits[:, -1]
                    for role in fused.roles
                }
            )
        assert float(told.log_probs[i]) == pytest.approx(
            float(made.log_probs[0, ahead[i]]), abs=1e-4
        )
    texts = fused.score("a fine film", " yes")
    first, second = words("a fine film")["input_ids"], words(" yes")["input_ids"]
    torch.testing.assert_close(texts.log_probs, fused.score(first, second).log_probs)


def test_upscaling_a_dial_and_the_reward():
    large, base = tiny(0, layers=3), tiny(1)
    kind, curt = moved(base, 2), moved(base, 3)
    words = tokenizer()
    up = upscale(
        large,
        kind,
        base,
        tokenizers=dict.fromkeys(("ref", "tuned", "base"), words),
        prompts={"tuned": "Review: {prompt}\nSentiment:"},
    )
    prompt, ahead = ids(1, 6)[0].tolist(), [11, 12, 13]
    from pluribus.decode import implicit_reward

    reward = implicit_reward(up, prompt, ahead)
    whole = torch.tensor([prompt + ahead])
    with torch.no_grad():
        gap = (kind(whole).logits.log_softmax(-1) - base(whole).logits.log_softmax(-1))[0]
    assert reward == pytest.approx(sum(float(gap[5 + i, t]) for i, t in enumerate(ahead)), abs=1e-4)
    made = up.encode(["a fine film", "12 34"])
    assert made["input_ids"].shape[0] == 2
    own = made["member_inputs"]["tuned"]
    text = words.decode(own["input_ids"][1][own["attention_mask"][1].bool()])
    assert text == "Review: 12 34\nSentiment:"
    between = dial(base, {"kind": kind, "curt": curt}, large, {"kind": 0.25, "curt": 0.75})
    first = between(ids()).logits
    between.set_weights({"kind": 1.0, "curt": 0.0})
    expected = upscale(large, kind, base)(ids()).logits
    torch.testing.assert_close(between(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first, expected)


@pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
def test_an_adapter_is_on_in_one_role_and_off_in_another():
    peft = optional("peft", "hf", "to make an adapter")
    base = tiny(1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain = tiny(1)
    adapted.eval()
    with torch.no_grad():
        tuned = adapted(input_ids=ids()).logits
        fused = Fused(
            {"large": tiny(0), "base": Unadapted(adapted), "expert": adapted}, StaticFusion()
        )
        assert len(fused.members) == 2
        expected = fused.fuser(
            {
                "large": fused.members_by_role["large"].runs(ids()).logits[:, -1],
                "base": plain(ids()).logits[:, -1],
                "expert": tuned[:, -1],
            }
        ).log_probs
        torch.testing.assert_close(fused(ids()).logits[:, -1], expected, atol=1e-4, rtol=1e-4)
        cached = fused.generate(ids(), **GREEDY)
        assert torch.equal(cached, fused.generate(ids(), **GREEDY, use_cache=False))


def test_a_fused_model_is_a_member_too():
    inner = Fused(trio(), StaticFusion())
    outer = Fused({"a": inner, "b": tiny(5)}, Product())
    with torch.no_grad():
        a, b = inner(ids()).logits, outer.members_by_role["b"].runs(ids()).logits.log_softmax(-1)
        torch.testing.assert_close(
            outer(ids()).logits, (a / 2 + b / 2).log_softmax(-1), atol=1e-5, rtol=1e-5
        )
    cached = outer.generate(ids(), **GREEDY)
    assert torch.equal(cached, outer.generate(ids(), **GREEDY, use_cache=False))


# -- weights ---------------------------------------------------------------------------------------


def test_weights_of_each_token(fused):
    prompt = padded([ids(1, 9)[0].tolist(), ids(1, 5, 1)[0].tolist()])
    out = fused.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert isinstance(out.cache, FusedCache)
    found = out.fusion_weights["expert"]
    n = out.sequences.shape[1] - 9
    assert found.shape == (2, n)
    mask = torch.cat((prompt["attention_mask"], torch.ones(2, n, dtype=torch.long)), 1)
    with torch.no_grad():
        again = fused(out.sequences, attention_mask=mask).weights["expert"]
    assert (found - again[:, 8:-1]).abs().max() <= 0.1 + 1e-6  # a step, where two are as good
    assert (found == again[:, 8:-1]).float().mean() > 0.8


@pytest.mark.parametrize("settings", [{}, {"length_penalty": -2.0}])
def test_weights_follow_their_beams(fused, settings):
    out = fused.generate(
        ids(2),
        **GREEDY,
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        **settings,
    )
    found = out.fusion_weights["expert"]
    assert found.shape[0] == 6
    with torch.no_grad():
        again = fused(out.sequences).weights["expert"]
    for row in range(6):
        n = int((out.beam_indices[row] >= 0).sum())
        assert found[row, n:].isnan().all()
        assert (found[row, :n] - again[row, 8 : 8 + n]).abs().max() <= 0.1 + 1e-6
    assert found.nan_to_num().unique().numel() > 2
