"""Inventories equal the page's formula row by row, PEFT's Poly and LoRA, and their own collapse."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.route import Routed, from_adapters, mhr
from pluribus.route._inventory import TaskRouter, low_rank, relaxed

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # collected without a package
sys.path.insert(0, str(Path(__file__).parent))
from skills import TASKS, inputs, net, wrapped
from tiny_model import model as tiny_llama  # type: ignore[import-not-found]

peft = optional("peft", "hf", "to compare with")
pytestmark = pytest.mark.filterwarnings(  # peft asks transformers by the old name
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def slow_delta(model: mhr.Skilled, path: str, task: int, x: torch.Tensor) -> torch.Tensor:
    """One row's addition to a layer's output, number by number from the page's formula."""
    place = model.paths.index(path)
    inventory, settings = model.inventories[place], model.settings
    router = model.routers[model.router_keys.index(mhr.shared_by(path, settings.granularity))]
    h, s, r = settings.heads, settings.skills, settings.rank
    z = router.table()[task].detach().tolist()
    a = torch.zeros(x.shape[-1], r)
    b = torch.zeros(r, inventory.outputs)
    wide, out = x.shape[-1] // h, inventory.outputs // h
    for q in range(h):
        p = [1 / (1 + math.exp(-z[q * s + i])) for i in range(s)]
        for i in range(s):
            weight = p[i] / sum(p)
            a[q * wide : (q + 1) * wide] += weight * inventory.a[q, i].detach()
            b[:, q * out : (q + 1) * out] += weight * inventory.b[q, i].detach()
    return x @ a @ b * (settings.alpha / r)


def slow(model: mhr.Skilled, x: torch.Tensor, task: int) -> torch.Tensor:
    """One example through the net with its own task's adapters."""
    up, down = model.base.up, model.base.down
    hidden = torch.tanh(up(x) + slow_delta(model, "up", task, x))
    return down(hidden) + slow_delta(model, "down", task, hidden)


@pytest.mark.parametrize("ids", ["abcabc", "aabbcc", "aaaaaa", "cbbbba"])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_every_row_is_its_own_mixture(ids, granularity):
    model = wrapped(granularity=granularity)
    x = inputs()
    with torch.no_grad():
        with model.tasks(list(ids)):
            found = model(x)
        for row, task in enumerate(ids):
            expected = slow(model, x[row], TASKS.index(task))
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


def test_the_three_ways_to_apply_adapters_agree():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 8, 4, generator=rng), torch.randn(3, 4, 6, generator=rng)
    for which in ([0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 2], [1, 0, 1, 1, 0, 2]):
        for places in (1, 9):
            x = torch.randn(6, places, 8, generator=rng)
            expected = torch.stack([x[i] @ a[k] @ b[k] for i, k in enumerate(which)])
            found = low_rank(x, a, b, torch.tensor(which))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_averaging_factors_is_not_averaging_products():
    model = wrapped(heads=1)
    inventory, router = model.inventories[0], model.routers[0]
    with torch.no_grad():
        weights = router(torch.tensor([1]))
        a, b = inventory.mixed(weights)
        products = torch.einsum("s,sdr,sro->do", weights[0, 0], inventory.a[0], inventory.b[0])
        assert (a[0] @ b[0] - products).abs().max() > 0.1 * products.abs().max()
        factors = [
            torch.einsum("s,sdr->dr", weights[0, 0], inventory.a[0]),
            torch.einsum("s,sro->ro", weights[0, 0], inventory.b[0]),
        ]
        torch.testing.assert_close(a[0] @ b[0], factors[0] @ factors[1])
        found = model.collapse("b").factors["up.weight"]
        torch.testing.assert_close(found[1] @ found[0], (factors[0] @ factors[1]).t() / 2)


def poly(base: nn.Module, model: mhr.Skilled):
    """PEFT's Poly on a base, with our tensors."""
    settings = model.settings
    made = peft.get_peft_model(
        base,
        peft.PolyConfig(
            r=settings.rank,
            n_tasks=len(TASKS),
            n_skills=settings.skills,
            n_splits=settings.heads,
            target_modules=list(model.paths),
        ),
    )
    layers = {
        name: module for name, module in made.named_modules() if hasattr(module, "poly_router")
    }
    with torch.no_grad():
        for path, ours, router in zip(model.paths, model.inventories, model.routers, strict=True):
            [theirs] = [m for name, m in layers.items() if name.endswith(path)]
            theirs.poly_lora_A["default"].copy_(ours.a)
            theirs.poly_lora_B["default"].copy_(ours.b)
            theirs.poly_router["default"].module_logits.copy_(router.logits)
    return made


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_pefts_poly(heads):
    model = wrapped(heads=heads)
    theirs, x, ids = poly(net(), model).eval(), inputs(), torch.tensor([2, 0, 1, 1, 0, 2])
    with torch.no_grad():
        found = model(x, task_ids=ids)
        torch.testing.assert_close(found, theirs.base_model(x, task_ids=ids), rtol=1e-5, atol=1e-5)
        assert (found - model.base.down(torch.tanh(model.base.up(x)))).abs().max() > 0


def test_noise_is_pefts_from_the_same_uniforms():
    model = wrapped(mode="relaxed").train()
    theirs, x, ids = poly(net(), model).train(), inputs(), torch.tensor([2, 0, 1, 1, 0, 2])
    torch.manual_seed(5)
    model.generator.manual_seed(5)
    with torch.no_grad():
        expected = theirs.base_model(x, task_ids=ids)
        torch.testing.assert_close(model(x, task_ids=ids), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(model(x, task_ids=ids), model(x, task_ids=ids))
        torch.testing.assert_close(model.collapse("a").factors, model.eval().collapse("a").factors)
        assert torch.equal(model(x, task_ids=ids), model(x, task_ids=ids))


def test_relaxed_draws_by_hand():
    z, u = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.9])
    expected = torch.sigmoid(torch.tensor([0.3, -1.0 + math.log(9)]))
    torch.testing.assert_close(relaxed(z, u), expected)
    assert relaxed(z, torch.tensor([0.0, 1.0])).isfinite().all()


def test_one_skill_and_one_head_is_pefts_lora(tmp_path):
    model = wrapped(skills=1, heads=1, rank=3)
    config = peft.LoraConfig(r=3, lora_alpha=1, target_modules=["up", "down"])
    theirs = peft.get_peft_model(net(), config).eval()
    with torch.no_grad():
        for path, ours in zip(model.paths, model.inventories, strict=True):
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(ours.a[0, 0].t())
            layer.lora_B["default"].weight.copy_(ours.b[0, 0].t())
        x = inputs()
        expected = theirs(x)
        for task in TASKS:
            torch.testing.assert_close(model(x, task_ids=task), expected, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_base_with_the_papers_bounds():
    base = net()
    x = inputs()
    expected = base(x)
    model = mhr.wrap(base, "up", rank=4, skills=8, heads=4, tasks=TASKS)
    assert torch.equal(model(x, task_ids="a"), expected)
    [inventory], [router] = model.inventories, model.routers
    assert inventory.a.shape == (4, 8, 2, 4)
    assert inventory.b.shape == (4, 8, 4, 3)
    assert router.logits.shape == (3, 32)
    bound = 1 / math.sqrt(3) / math.sqrt(8)  # the full width, whatever the heads
    assert 0.95 * bound < inventory.a.abs().max() <= bound
    assert 0.9e-3 < router.logits.abs().max() <= 1e-3


def test_the_base_stays_as_it_was():
    base = net()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    expected = base(inputs())
    model = wrapped(base)
    with model.tasks("b"):
        model(inputs())
    assert torch.equal(base(inputs()), expected)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    other = wrapped(base, skills=2)  # two inventories on one base do not meet
    one = model(inputs(), task_ids="a")
    other(inputs(), task_ids="a")
    assert torch.equal(model(inputs(), task_ids="a"), one)
    assert len(base.up._forward_hooks) == 2
    assert model.detach() is base
    assert len(base.up._forward_hooks) == 1
    del other  # nobody can set its tasks any more
    assert not base.up._forward_hooks


@pytest.mark.parametrize("mode", ["sigmoid", "relaxed", "straight_through"])
def test_collapsed_is_routed(mode, tmp_path):
    model = wrapped(mode=mode)
    x, base = inputs(), net()
    with torch.no_grad():
        routed = Routed(base, {task: model.collapse(task).part() for task in TASKS})
        names = list("cabbca")
        expected = model(x, task_ids=names)
        torch.testing.assert_close(routed(x, weights=names), expected, rtol=1e-6, atol=1e-6)
        base.load_state_dict(model.materialise("c"))
        torch.testing.assert_close(base(x), model(x, task_ids="c"), rtol=1e-6, atol=1e-6)
    model.collapse("a").save(tmp_path / "a", base_model="net")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x, task_ids="a"), rtol=1e-5, atol=1e-6)
    found = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    for name, tensor in model.collapse("a").state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_gpt2s_transposed_layers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16)
        return GPT2LMHeadModel(config).eval()

    model = wrapped(gpt2(), targets=r".*(c_attn|mlp.c_proj)")
    ids = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routed = model(ids, task_ids=["a", "c", "a"]).logits
        assert (routed - model.base(ids).logits).abs().max() > 0.01
        merged = gpt2()
        merged.load_state_dict(model.materialise("c"))
        torch.testing.assert_close(merged(ids[1:2]).logits[0], routed[1], rtol=1e-5, atol=1e-5)
        model.collapse("a").save(tmp_path / "a")
        again = from_adapters(gpt2(), {"a": tmp_path / "a"})
        torch.testing.assert_close(
            again(ids[:1], weights="a").logits[0], routed[0], rtol=1e-5, atol=1e-5
        )
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "a").eval()
        torch.testing.assert_close(theirs(ids[2:]).logits[0], routed[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_each_tasks_own(beams):
    model = wrapped(tiny_llama(), targets=r".*(q_proj|v_proj|down_proj)")
    prompt = torch.randint(5, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    names = ["c", "a", "b"]
    mask = torch.ones_like(prompt)
    found = model.generate(prompt, attention_mask=mask, task_ids=names, **settings)
    for row, name in enumerate(names):
        alone = tiny_llama()
        alone.load_state_dict(model.materialise(name))
        [one] = alone.generate(
            prompt[row : row + 1], attention_mask=mask[row : row + 1], **settings
        )
        assert torch.equal(found[row, : len(one)], one)
    with pytest.raises(InputError, match="no task ids"):
        model.generate(prompt)


def test_mu_follows_the_copies_of_the_authors_code():
    """50 steps of Adam on one adapter, and on S copies under a constant 1/S."""
    model = wrapped(heads=2, skills=4)
    copies = model.copy()
    router = copies.routers
    with torch.no_grad():
        for one in router:
            one.logits.zero_()  # equal logits: a constant 1 / S
    groups = model.new_task("new", adapt="mu")
    x, y = inputs(16), torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(3))
    numbers = sum(p.numel() for group in groups for p in group["params"])
    assert numbers == sum(2 * (one.inputs + one.outputs) for one in model.inventories)
    start = [one.own_a["0"].detach().clone() for one in model.inventories]
    ours = torch.optim.Adam(groups, lr=1e-3)
    theirs = torch.optim.Adam([p for one in copies.inventories for p in (one.a, one.b)], lr=1e-3)
    for _ in range(50):
        for one, optimiser, task in ((model, ours, "new"), (copies, theirs, "a")):
            optimiser.zero_grad()
            (one(x, task_ids=task) - y).square().mean().backward()
            optimiser.step()
    for one, copied, before in zip(model.inventories, copies.inventories, start, strict=True):
        a, b = copied.mean()
        torch.testing.assert_close(one.own_a["0"], a, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.own_b["0"], b, rtol=0, atol=1e-4)
        assert (one.own_a["0"] - before).abs().max() > 0.01
    with torch.no_grad():
        mixed = model(x, task_ids=["new", "b"] * 8)
        torch.testing.assert_close(mixed[1], slow(model, x[1], 1), rtol=1e-5, atol=1e-5)
        collapsed = net()
        collapsed.load_state_dict(model.materialise("new"))
        torch.testing.assert_close(mixed[0], collapsed(x[:1])[0], rtol=1e-5, atol=1e-5)


def test_mean_is_where_mu_starts():
    model = wrapped()
    mean = model.collapse("mean")
    model.new_task("new", adapt="mu")
    for name, (a, b) in model.collapse("new").factors.items():
        torch.testing.assert_close(a, mean.factors[name][0])
        torch.testing.assert_close(b, mean.factors[name][1])


def moved(model: mhr.Skilled, groups, task: str, steps: int = 3) -> set[str]:
    """Names of the parameters that some steps of training change."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimiser.zero_grad()
        model(inputs(), task_ids=task).square().mean().backward()
        optimiser.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_what_a_new_task_trains():
    model = wrapped()
    x = inputs()
    others = model(x, task_ids="b").detach()
    uniform = model.new_task("routed", adapt="z")
    assert sum(p.numel() for group in uniform for p in group["params"]) == 2 * 2 * 3
    assert all(p.abs().max() <= 1e-3 for p in uniform[0]["params"])
    assert moved(model, uniform, "routed") == {"routers.0.added.0", "routers.1.added.0"}
    assert torch.equal(model(x, task_ids="b"), others)
    own = model.new_task("own", adapt="mu")
    assert {name.split(".")[2] for name in moved(model, own, "own")} == {"own_a", "own_b"}
    assert torch.equal(model(x, task_ids="b"), others)
    apart = model.copy()
    everything = apart.new_task("all")
    assert [group["lr"] for group in everything] == [1e-3, 0.1]
    assert everything[1]["weight_decay"] == 0
    changed = moved(apart, everything, "all")
    assert {"inventories.0.a", "inventories.1.b", "routers.0.added.0"} <= changed
    assert "routers.0.logits" not in changed
    assert torch.equal(model(x, task_ids="b"), others)  # the copy's base is the same, alone


def test_both_rates_learn_to_route():
    """Tasks with opposite targets; with one rate for all, the logits hardly leave their start."""
    x = inputs(12)
    y = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(3))
    signs = torch.tensor([1.0, -1.0, 0.5]).repeat(4)[:, None, None]

    def trained(router_lr: float) -> tuple[mhr.Skilled, float]:
        model = mhr.wrap(net(), "up|down", 2, 4, 2, tasks=TASKS)
        optimiser = torch.optim.AdamW(model.trainable("all", lr=1e-2, router_lr=router_lr))
        for _ in range(60):
            optimiser.zero_grad()
            loss = (model(x, task_ids=list("abc") * 4) - signs * y).square().mean()
            loss.backward()
            optimiser.step()
        return model, float(loss.detach())

    routed, loss = trained(0.1)
    assert max(one.largest for one in routed.diagnostics().values()) > 0.5
    flat, worse = trained(1e-5)
    assert loss < worse
    with pytest.warns(UserWarning, match="no routing logit is beyond 0.05"):
        flat.diagnostics()


def test_shared_logits():
    model = tiny_llama()
    expected = {"layer": 6, "module": 4, "block": 2, "stack": 1, "model": 1}
    for granularity, tables in expected.items():
        found = mhr.wrap(model, r".*(q_proj|v_proj|down_proj)", 1, 2, 2, granularity, tasks=TASKS)
        assert len(found.routers) == tables
        found.detach()
    assert mhr.shared_by("encoder.block.3.layer.0.q", "block") == "encoder.block.3"
    assert mhr.shared_by("encoder.block.3.layer.0.q", "stack") == "encoder.block"
    assert mhr.shared_by("up", "block") == "up"


def test_rounding_passes_gradients_and_survives_empty_heads():
    router = TaskRouter(1, 3, 2, "straight_through", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.logits.copy_(torch.tensor([[1.0, -1.0, 2.0, -1.0, -2.0, -3.0]]))
    weights = router(torch.tensor([0]))
    expected = torch.tensor([[[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(weights, expected)
    (weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    # d alpha / d p at p = (1, 0, 1): row sums (c - mean)/2; times sigmoid' of each logit
    slope = torch.sigmoid(router.logits.detach()) * torch.sigmoid(-router.logits.detach())
    centred = torch.tensor([[(1 - 2) / 2, (2 - 2) / 2, (3 - 2) / 2, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(router.logits.grad, slope * centred)


def test_annealing_ends_at_the_mean():
    model = wrapped()
    x, mean = inputs(), model.copy()
    with torch.no_grad():
        plain = model.routers[0](torch.tensor([1]))
        model.anneal(0.5)
        half = model.routers[0](torch.tensor([1]))
        share = math.cos(math.pi / 4)
        torch.testing.assert_close(half, share * plain + (1 - share) / 3)
        model.anneal(1.0)
        mean.new_task("m", adapt="mu")
        torch.testing.assert_close(
            model(x, task_ids="a"), mean(x, task_ids="m"), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(InputError, match=r"within \[0, 1\]"):
        model.anneal(1.5)


def test_diagnostics_by_hand():
    model = mhr.wrap(net(), "up", 1, 2, 1, tasks=["a", "b"])
    with torch.no_grad():
        model.routers[0].logits.copy_(torch.tensor([[math.log(3), -math.log(3)], [0.1, 0.1]]))
    found = model.diagnostics()["up"]
    p = 0.75  # sigmoid(ln 3)
    q = 1 / (1 + math.exp(-0.1))

    def bits(x: float) -> float:
        return -(x * math.log2(x) + (1 - x) * math.log2(1 - x))

    mean = ((p + 0.5) / 2, (0.25 + 0.5) / 2)
    assert found.sparsity == 0.75  # three of four are on
    assert found.discreteness == pytest.approx((2 * bits(p) + 2 * bits(q)) / 4, abs=1e-6)
    entropy = -sum(m * math.log(m) for m in mean) / math.log(2)
    assert found.efficiency == pytest.approx(entropy, abs=1e-6)
    assert found.largest == pytest.approx(math.log(3), abs=1e-6)


def test_batch_norms_of_the_base_stay_frozen():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model = mhr.wrap(base, "0", 1, 2, 2, tasks=TASKS).train()
    before = base[1].running_mean.clone()
    model(torch.randn(8, 4), task_ids="a")
    assert torch.equal(base[1].running_mean, before)
    assert base[2].training
