"""Does a recommended merge lose less than always choosing the best single method?

By what `inspect` sees in the weights alone: not reliably, on zoos left out, so without a score it
recommends the method that is best on average. With a score (`inspect --try`) it merges by the four
methods that are forecast to lose least, and recommends what keeps most on a few validation inputs.

For pools of experts of five beds, eleven static merges at fixed parameters were scored on each
pool's own tasks (`pluribus.inspect.calibrate`). One zoo after the other is left out with all its
pools: on the others, of all seeds, the forecast is fitted, its penalty and features are chosen
(again by leaving zoos out), and the methods are ranked by what they lose there on average. For
every pool of this seed that was left out then choose: features of the pool, a trial of the first
four of the ranking on the pool's validation inputs, and the first of the ranking, always the same.
All are scored on as many test inputs. Beds weigh the same.

The harder test leaves out all zoos that share data sets: vision8 and vision8_pretrained are the
same tasks on another encoder.
"""

from collections.abc import Callable, Sequence

from pluribus.claims import Check, Claim, OnStep
from pluribus.inspect.beds import BEDS
from pluribus.inspect.calibrate import Measured, measure_beds
from pluribus.inspect.forecast import fit, zoo_of

TRIES = 4
WHO = ("tried", "recommended", "single")
SEEDS = (0, 1, 2)  # whose pools the fits see, of the zoos that are not left out

CLAIM = Claim(
    name="recommendation",
    title="A recommendation beats always choosing the best single method",
    paper="Own",
    data="pools of 2 to 8 experts of vision6 (twice), vision8, vision8_pretrained, text6; 48 to "
    "200 validation and as many test inputs a task; every zoo left out in turn",
    model="small encoders: three transformers, EfficientNet-Lite0, MiniLM",
    metric="accuracy over the specialists' own, mean over held-out beds, percent",
    checks=(
        Check(
            text="recommended after trials over the best single method of the other zoos",
            left="tried",
            right="single",
            margin=0.25,
        ),
        Check(
            text="recommended by weights alone over the best single method of the other zoos",
            left="recommended",
            right="single",
            margin=0.25,
        ),
        Check(
            text="recommended after trials over the average of weights",
            left="tried",
            right="average",
            asserted=False,
        ),
        Check(
            text="the best single method of the other zoos over the rules of thumb",
            left="single",
            right="rules",
            margin=1.0,
        ),
        Check(
            text="the best candidate of each pool, in hindsight, over the recommended after trials",
            left="best",
            right="tried",
            asserted=False,
        ),
        *(
            Check(
                text=f"{told} over the best single method, all zoos of the same data left out",
                left=f"{who}_data",
                right="single_data",
                asserted=False,
            )
            for who, told in (("tried", "after trials"), ("recommended", "by weights alone"))
        ),
        *(
            Check(
                text=f"{bed}: {told} over the best single method of the other zoos",
                left=f"{who}_{bed}",
                right=f"single_{bed}",
                asserted=False,
            )
            for bed in BEDS
            for who, told in (("tried", "after trials"), ("recommended", "by weights alone"))
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for the pools of the zoos of one seed.

    Processes that measure several seeds at once begin with different ones and share the work.
    """
    found = measure_beds(list(BEDS.values()), list(dict.fromkeys((seed, *SEEDS))), on_step)
    seeds = dict.fromkeys((*SEEDS, seed))
    return held_out([pool for s in seeds for name in BEDS for pool in found[name, s]], seed)


def held_out(pools: Sequence[Measured], seed: int) -> dict[str, float]:
    """Return the mean scores of what was chosen for a seed's pools, which took no part in it."""
    out = chosen(pools, seed, zoo_of)
    by_data = chosen(pools, seed, lambda pool: zoo_of(pool).partition("_")[0])
    return out | {f"{name}_data": by_data[name] for name in WHO}


def chosen(
    pools: Sequence[Measured], seed: int, group: Callable[[Measured], str]
) -> dict[str, float]:
    """Leave out one group after the other; return scores by who chose, in all and by bed."""
    scores: dict[str, dict[str, list[float]]] = {}
    for held in dict.fromkeys(group(pool) for pool in pools):
        model = fit([pool for pool in pools if group(pool) != held], group)
        means = dict(zip(model.methods, model.means.tolist(), strict=True))
        ranking = sorted(means, key=lambda method: means[method])
        for pool in pools:
            if group(pool) != held or pool.seed != seed:
                continue
            lost = {
                "tried": pool.test[min(ranking[:TRIES], key=lambda method: pool.loss[method])],
                "recommended": pool.test[model.predict(pool.features)[0].method],
                "single": pool.test[ranking[0]],
                "average": pool.test["linear"],
                "rules": pool.rules_test,
                "best": min(pool.test.values()),
            }
            for who, loss in lost.items():
                scores.setdefault(who, {}).setdefault(pool.bed, []).append(100 * (1 - loss))
    out = {}
    for who, beds in scores.items():
        means = {bed: sum(values) / len(values) for bed, values in beds.items()}
        out[who] = sum(means.values()) / len(means)
        if who in WHO:
            out |= {f"{who}_{bed}": value for bed, value in means.items()}
    return out
