import numpy as np
import pytest

from pluribus.core.chain import Chain, as_merger, parse, text, update_of
from pluribus.core.errors import InputError, RecipeError
from pluribus.core.merger import At, facts, stages
from pluribus.core.registry import MERGERS, STEPS
from pluribus.engine.reference import merge_arrays
from pluribus.merge.consensus import Consensus
from pluribus.merge.linear import Linear
from pluribus.merge.lines import Lines
from pluribus.merge.steps import (
    average,
    band,
    consensus,
    drop,
    elect,
    lines,
    mean,
    scale,
    trim,
)
from pluribus.merge.steps import max as largest
from pluribus.merge.steps import sum as total
from pluribus.merge.ties import Ties

SHAPES = {"layers.0.w": (30, 7), "layers.1.w": (13, 11), "head": (5, 5), "bias": (3,)}


@pytest.fixture
def models():
    rng = np.random.default_rng(3)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    experts = [
        {
            n: b + np.float32(0.3) * rng.standard_normal(b.shape).astype(np.float32)
            for n, b in base.items()
        }
        for _ in range(3)
    ]
    for expert in experts:  # planted ties of magnitude and cancelling votes
        expert["head"][0] = base["head"][0] + np.float32(0.5)
    experts[1]["head"][0] = base["head"][0] - np.float32(0.5)
    experts[2]["head"][0] = base["head"][0]
    return base, experts


def same_bits(one, other):
    return all(np.array_equal(one[n].view(np.uint32), other[n].view(np.uint32)) for n in one)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("count", ["exact", "official"])
@pytest.mark.parametrize("tie", ["positive", "global"])
@pytest.mark.parametrize("agg", ["mean", "sum"])
def test_the_chain_of_the_paper_is_ties_bit_for_bit(models, scope, count, tie, agg):
    whole = Ties(density=0.2, scope=scope, count=count, tie=tie, agg=agg)
    last = {"mean": mean, "sum": total}[agg]()
    chain = trim(density=0.2, scope=scope, count=count) >> elect(tie=tie) >> last
    assert same_bits(merge_arrays(whole, *models), merge_arrays(chain, *models))


def test_the_chain_of_the_task(models):
    chain = trim(density=0.2) >> elect() >> mean()
    whole = Ties(density=0.2, normalize=True)
    assert same_bits(merge_arrays(whole, *models), merge_arrays(chain, *models))


def test_weights_before_and_after_the_vote_are_the_weights_of_ties(models):
    weight = (1.0, 0.5, 2.0)
    chain = trim(density=0.4) >> elect(weight=weight) >> mean(weight=weight)
    whole = Ties(density=0.4, weight=weight)
    assert same_bits(merge_arrays(whole, *models), merge_arrays(chain, *models))


def test_torch_gives_the_values_numpy_gives(models):
    torch = pytest.importorskip("torch")
    base, experts = models
    chain = (
        trim(density=0.3) >> drop(density=0.5) >> elect(by="normmass") >> mean() >> scale(scale=2.0)
    )
    as_torch = [{n: torch.from_numpy(v) for n, v in m.items()} for m in (base, *experts)]
    got = merge_arrays(chain, as_torch[0], as_torch[1:], seed=5)
    want = merge_arrays(chain, base, experts, seed=5)
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("whole", "chain"),
    [
        ("dare_linear(density=0.5, rescale_by='1/p')", "drop(density=0.5) >> sum"),
        ("dare_linear(density=0.5)", "drop(density=0.5, rescale='l1') >> sum"),
        ("dare_ties(density=0.5, rescale_by='1/p')", "drop(density=0.5) >> elect >> sum"),
        ("breadcrumbs(density=0.3, gamma=0.1)", "band(density=0.3, gamma=0.1) >> sum"),
        (
            "breadcrumbs_ties(density=0.3, gamma=0.1)",
            "band(density=0.3, gamma=0.1) >> elect >> sum",
        ),
        ("task_arithmetic", "sum"),
        ("magmax", "max"),
    ],
)
def test_other_methods_are_chains_too(models, whole, chain):
    method = as_merger(whole)
    want = merge_arrays(method, *models, seed=4)
    got = merge_arrays(parse(chain), *models, seed=4)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6)


def test_by_hand():
    base = {"w": np.zeros(4, np.float32)}
    experts = [{"w": np.float32([5, -1, 0.2, 3])}, {"w": np.float32([4, 2, -0.1, -1])}]

    def merged(chain):
        return merge_arrays(parse(chain), base, experts)["w"].tolist()

    assert merged("trim(density=0.5) >> elect >> mean") == [4.5, 2.0, 0.0, 3.0]
    assert merged("sum") == pytest.approx([9, 1, 0.1, 2], abs=1e-6)
    assert merged("average") == pytest.approx([4.5, 0.5, 0.05, 1], abs=1e-6)
    assert merged("max") == pytest.approx([5, 2, 0.2, 3])
    assert merged("elect >> max") == pytest.approx([5, 2, 0.2, 3])
    assert merged("scale(scale=[1.0, 10.0]) >> sum") == pytest.approx([45, 19, -0.8, -7], abs=1e-5)
    assert merged("elect(by='signs') >> sum") == pytest.approx([9, 2, 0.2, 3])
    # Shares of squared norms: expert 1 has norm^2 35.04, expert 2 has 21.01.
    assert merged("elect(by='normfrac') >> sum") == pytest.approx([9, 2, 0.2, 3])
    assert merged("band(density=0.5, gamma=0.25) >> sum") == pytest.approx([0, 1, 0, 2])
    assert merged("sum >> trim(density=0.25)") == [9, 0, 0, 0]


def test_normfrac_and_normmass_weigh_by_the_share_of_the_norm():
    base = {"w": np.zeros(2, np.float32)}
    # Coordinate 0: -1 is the whole of expert 2, and 2 next to nothing of expert 1.
    experts = [{"w": np.float32([2, 100])}, {"w": np.float32([-1, 0])}]
    for by in ("normfrac", "normmass"):
        merged = merge_arrays(elect(by=by) >> total(), base, experts)["w"]
        assert merged.tolist() == [-1, 100]
    assert merge_arrays(elect() >> total(), base, experts)["w"].tolist() == [2, 100]


def test_drop_is_unbiased_and_keeps_norms_when_asked(models):
    base = {"w": np.zeros(20000, np.float32)}
    experts = [{"w": np.ones(20000, np.float32)} for _ in range(2)]
    plain = merge_arrays(drop(density=0.25) >> average(), base, experts, seed=1)["w"]
    assert abs(plain.mean() - 1) < 0.03
    assert set(np.unique(plain)) == {0.0, 2.0, 4.0}  # the two experts drop independently
    kept = merge_arrays(drop(density=0.25, rescale="l1") >> average(), base, experts, seed=1)["w"]
    assert kept.mean() == pytest.approx(1, abs=1e-6)
    raw = merge_arrays(drop(density=0.25, rescale="none") >> total(), base, experts, seed=1)["w"]
    assert set(np.unique(raw)) == {0.0, 1.0, 2.0}
    again = merge_arrays(drop(density=0.25) >> average(), base, experts, seed=2)["w"]
    assert not np.array_equal(plain, again)


def test_folds_see_what_leaves_the_steps_before(models):
    # After the first trim half of each row is zero, so a second one at 0.25 keeps the same as one.
    twice = trim(density=0.5) >> trim(density=0.25) >> total()
    once = trim(density=0.25) >> total()
    assert same_bits(merge_arrays(twice, *models), merge_arrays(once, *models))
    # A band that drops the top after a trim is not what it is before it.
    one = trim(density=0.5) >> scale(scale=(1.0, 0.0, 0.0)) >> elect(by="normfrac") >> total()
    base, experts = models
    alone = merge_arrays(trim(density=0.5) >> total(), base, experts[:1])
    assert same_bits(merge_arrays(one, *models), alone)


def test_a_whole_method_can_be_the_head(models):
    depth = {"layers.0.w": 0, "layers.1.w": 1}
    chain = Ties(density=0.2) >> lines(beta=0.8, alpha=0.1)
    merged = merge_arrays(chain, *models, depth=depth)
    plain = merge_arrays(Ties(density=0.2), *models)
    base, _ = models
    for name, factor in {"layers.0.w": 0.1, "layers.1.w": 0.9, "head": 0.1}.items():
        want = base[name] + np.float32(factor) * (plain[name] - base[name])
        np.testing.assert_allclose(merged[name], want, atol=1e-6)
    as_method = Lines(of=Ties(density=0.2), beta=0.8, alpha=0.1)
    assert same_bits(merge_arrays(as_method, *models, depth=depth), merged)


def test_a_head_whose_update_stays_keeps_its_bits(models):
    assert same_bits(
        merge_arrays(Ties(density=0.3) >> scale(scale=1.0), *models),
        merge_arrays(Ties(density=0.3), *models),
    )
    base, experts = models
    gone = merge_arrays(Linear() >> scale(scale=0.0), base, experts)
    assert same_bits(gone, base)


def test_blocks_change_nothing(models):
    """Element grain: any split of a tensor gives the same bits, with folds known."""
    base, experts = models
    chain = trim(density=0.3) >> drop(density=0.6) >> elect(by="normmass") >> mean()
    chain >>= consensus(k=1)
    b, e = base["head"].reshape(-1), np.stack([x["head"].reshape(-1) for x in experts])
    at = At("head", (5, 5), 0, 25, 0, 0)
    folded = {}
    for stage in stages(chain):
        for key, fold in stage.items():
            result = fold
            while hasattr(result, "finish"):
                values = result.of(b, e, at=at, **folded)
                result = result.finish(result.update(result.init(), values, at))
            folded[key] = result
    folded["0_cut"] = folded["0_cut"]._replace(before=None)
    whole = chain(b, e, at=at, **folded)
    parts = [
        chain(b[i:j], e[:, i:j], at=at._replace(start=i, stop=j, block=n), **folded)
        for n, (i, j) in enumerate([(0, 7), (7, 8), (8, 25)])
    ]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(update_of(chain, b, e, at, folded) + b, whole)


def test_facts():
    chain = trim() >> drop() >> total()
    assert facts(chain).random
    assert facts(chain).grain == "element"
    assert facts(chain).base == "required"
    assert "2306.01708" in facts(chain).paper
    assert not facts(Ties() >> lines()).idempotent
    assert facts(Chain.of(Linear())).base == "ignored"
    assert facts(Linear() >> scale()).base == "required"
    if "iso_c" in MERGERS:
        assert facts(MERGERS["iso_c"]() >> scale()).grain == "tensor"
    assert facts(Lines(of="trim >> drop >> sum")).random
    assert facts(Lines()).name == "lines"


# -- text ------------------------------------------------------------------------------------------

CHAINS = [
    trim(density=0.2) >> elect() >> mean(),
    trim(density=(0.2, 0.3), scope="model") >> elect(by="signs") >> mean(weight=(1.0, 2.0)),
    Ties(density=0.25, tie="global") >> lines(beta=0.8, schedule="sqrt") >> scale(scale=-1.5),
    band(gamma=(0.01, 0.02)) >> drop(rescale="l1", stream="it's") >> largest(),
    Chain.of(Lines(of=trim() >> total(), alpha=1.0)),
    Lines(of=Ties()) >> scale(),
    Chain.of(Consensus(multi=Ties())),
    Chain.of(Consensus(multi="ties", mask_lambda=(0.1, 0.2))),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_text_round_trip(chain):
    assert parse(str(chain)) == chain
    assert str(parse(str(chain))) == str(chain)
    assert hash(parse(str(chain))) == hash(chain)


def test_text_reads_as_written():
    assert str(parse("trim( density = .2 )>>elect()>>mean")) == "trim >> elect >> mean"
    assert str(parse("trim(density=0.3) >> elect >> mean")) == "trim(density=0.3) >> elect >> mean"
    assert text(Ties(density=0.5)) == "ties(density=0.5)"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("trim >> elct >> mean", "Did you mean 'elect'"),
        ("tis >> lines", "Did you mean 'ties'"),
        ("trim(0.2) >> mean", "go by name"),
        ("mean >> ties", "only begin a chain"),
        ("a.b >> mean", "not a step"),
        ("trim(density=open('x')) >> mean", "is not a number"),
        ("trim(**{'density': 0.2}) >> mean", r"or a \*\*"),
        ("trim(density=0.2, density=0.3) >> mean", "cannot be read|twice"),
        ("scale(lambda=2) >> sum", "called scale"),
        ("trim + sum", "nothing else"),
        ("trim >> ", "cannot be read"),
        ("", "cannot be read"),
        ("trim >> (elect >> mean)", "not a step"),
        ("(lambda: 1) >> mean", "not a step"),
        ("trim if 1 else mean", "not a step"),
        ("x" * 20_000, "characters"),
    ],
)
def test_text_is_strict(written, says):
    with pytest.raises(RecipeError, match=says):
        parse(written)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("trim(density=2.0) >> mean", "density = 2.0"),
        ("trim(densty=0.2) >> mean", "Did you mean 'density'"),
        ("sum >> mean", "combines once"),
        ("ties >> mean", "combines once"),
        ("trim >> consensus >> sum", "after one of average, blend, max, mean, sum"),
        ("mean(weight=-1.0)", "negative"),
    ],
)
def test_order_and_parameters_are_checked(written, says):
    with pytest.raises(InputError, match=says):
        parse(written)


def test_a_chain_that_combines_nothing_says_so(models):
    with pytest.raises(InputError, match="combines nothing"):
        merge_arrays(trim() >> elect(), *models)
    with pytest.raises(InputError, match="combines nothing"):
        as_merger("trim >> elect")
    with pytest.raises(InputError, match="write Elect"):
        trim() >> elect
    with pytest.raises(InputError, match="neither a step"):
        trim() >> 3


def test_as_merger():
    assert as_merger("ties") == Ties()
    assert as_merger({"merge_method": "ties", "parameters": {"lambda": 2.0}}) == Ties(scale=2.0)
    chain = trim() >> total()
    assert as_merger("trim >> sum") == chain
    assert as_merger(chain) is chain
    with pytest.raises(RecipeError):
        as_merger({"merge_method": "ties", "params": {}})
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        as_merger("tiess")


def test_average_refuses_weights_that_cancel(models):
    with pytest.raises(InputError, match="sum to zero"):
        merge_arrays(Chain.of(average(weight=(1.0, -1.0, 0.0))), *models)


def test_registries_tell_steps_from_methods():
    assert "steps" not in MERGERS
    assert {"trim", "band", "drop", "elect", "mean", "sum", "scale", "lines", "consensus"} <= set(
        STEPS
    )
    for name in STEPS:
        about = STEPS[name].__pluribus_step__
        assert about.name == name
        assert about.summary.endswith((".", ")."))


@pytest.mark.parametrize(
    "method",
    [
        "trim(density=0.2) >> elect >> mean",
        "trim(density=0.2, scope='model') >> elect(tie='global') >> mean >> lines(beta=0.7)",
        "band(density=0.3, gamma=0.05) >> drop(density=0.5, rescale='l1') >> sum",
        "elect(by='normmass') >> sum",
        "ties(density=0.3) >> scale(scale=0.5) >> consensus(k=1)",
        "lines(of='ties(density=0.2)', beta=0.8)",
        "consensus(multi='ties')",
        "pcb(ratio=0.2)",
        "pcb(ratio=0.2, scope='tensor', variant='vision')",
    ],
)
def test_streamed_equals_in_memory(tmp_path, method):
    """Tensors of several blocks, on threads, through files."""
    from pluribus.core.pool import Pool
    from pluribus.core.weights import Weights
    from pluribus.engine.driver import merge

    rng = np.random.default_rng(1)
    shapes = {"layers.0.w": (700, 411), "layers.1.w": (300, 411), "embed": (101, 7)}
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    experts = [
        {
            n: b + np.float32(0.05) * rng.standard_normal(b.shape).astype(np.float32)
            for n, b in base.items()
        }
        for _ in range(3)
    ]
    chain = parse(method)
    want = merge_arrays(chain, base, experts, seed=3, depth={"layers.0.w": 0, "layers.1.w": 1})
    for number, model in enumerate([base, *experts]):
        Weights.of(model).save(tmp_path / f"{number}.safetensors")
    pool = Pool(tmp_path / "0.safetensors", [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)])
    got = merge(pool, chain, tmp_path / "out.safetensors", seed=3, threads=2, memory=16 << 20)
    exact = not ("lines" in method or "normmass" in method or "l1" in method)
    for name in base:
        if exact:  # sums over blocks are added in another order than over one
            assert np.array_equal(got[name].numpy(), want[name]), name
        else:
            np.testing.assert_allclose(got[name].numpy(), want[name], atol=2e-6)
