"""Exceptions, statements, glasses, sums and glyphs: answers found again another way."""

import math
import random
import re
from collections import Counter

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.tasks.suites import suite
from pluribus.tasks.suites.exceptions import (
    FEATURES,
    LABELS,
    draw,
    exceptions_of,
    passes,
    prompt,
)


def lists(count=30, exceptions=2):
    return [draw(random.Random(seed), exceptions) for seed in range(count)]


def agreement(drawn, feature):
    """How many labels the better way to read one feature tells."""
    value = FEATURES[feature][1][0]
    hits = sum(
        (vehicle[feature] == value) == (label == "A")
        for vehicle, label in zip(drawn.vehicles, drawn.labels, strict=True)
    )
    return max(hits, 10 - hits)


@pytest.mark.parametrize("exceptions", [1, 2, 3])
def test_one_feature_tells_nearly_all_and_the_others_nothing(exceptions):
    for drawn in lists(exceptions=exceptions):
        assert Counter(drawn.labels) == {"A": 5, "B": 5}
        assert len({vehicle[-1] for vehicle in drawn.vehicles}) == 10
        for feature in range(4):
            wanted = 10 - exceptions if feature == drawn.rule else 5
            assert agreement(drawn, feature) == wanted
        assert len(exceptions_of(drawn)) == exceptions


def remembers(told, vehicle):
    return dict(told).get(vehicle, "A")


def test_who_remembers_needs_two_passes():
    assert [passes(remembers, drawn, seed) for seed, drawn in enumerate(lists())] == [2] * 30


def test_who_goes_by_the_best_feature_never_learns():
    for seed, drawn in enumerate(lists()):
        value = FEATURES[drawn.rule][1][0]
        own = [v for v, label in zip(drawn.vehicles, drawn.labels, strict=True) if label == "A"]
        label = "A" if sum(v[drawn.rule] == value for v in own) > 2 else "B"
        other = "B" if label == "A" else "A"
        rule = drawn.rule

        def agent(told, vehicle, rule=rule, value=value, label=label, other=other):
            return label if vehicle[rule] == value else other

        assert passes(agent, drawn, seed) == 16
        assert passes(agent, drawn, seed, most=3) == 4


def test_passes_count_up_to_the_perfect_one():
    [drawn] = lists(1)
    truth = dict(zip(drawn.vehicles, drawn.labels, strict=True))
    assert passes(lambda told, vehicle: truth[vehicle], drawn, 0) == 1
    late = passes(lambda told, vehicle: truth[vehicle] if len(told) >= 41 else None, drawn, 0)
    assert late == 6  # answers from the second question of the fifth pass on
    seen = []
    passes(lambda told, vehicle: seen.append((len(told), vehicle)), drawn, 0, most=2)
    assert [count for count, _ in seen] == list(range(20))
    orders = [vehicle for _, vehicle in seen]
    assert orders[:10] != orders[10:]
    assert set(orders[:10]) == set(orders[10:]) == set(drawn.vehicles)
    with pytest.raises(InputError, match="0 passes"):
        passes(remembers, drawn, 0, most=0)


def test_exceptions_are_asked_for_in_turn_and_their_labels_were_told():
    items = suite("exceptions", n=40)
    assert [one.meta["exception"] for one in items] == [True, False] * 20
    for one in items:
        drawn, asked = one.meta["vehicles"], one.meta["asked"]
        plate = drawn.vehicles[asked][-1]
        assert one.answer == drawn.labels[asked]
        assert re.search(rf"plate {plate}: (\w)", one.prompt).group(1) == one.answer
        assert one.prompt.count(plate) == 2
    assert "Seen so far" not in prompt([], items[0].meta["vehicles"].vehicles[0])
    assert LABELS == ("A", "B")


def clash(first, second):
    """Whether two statements exclude each other, read word by word."""
    if found := re.fullmatch(r"All the (\w+) in the (\w+) are (\w+)\.", first):
        other = re.fullmatch(r"One of the (\w+) in the (\w+) is (\w+)\.", second)
        thing, place, colour = found.groups()
        return other.group(1, 2) == (thing, place) and other.group(3) != colour
    if found := re.fullmatch(r"(\w+) is taller than (\w+)\.", first):
        return re.fullmatch(r"(\w+) is taller than (\w+)\.", second).groups() == (
            found.group(2),
            found.group(1),
        )
    if found := re.fullmatch(r"There are exactly (\d+) .*", first):
        return int(re.search(r"at least (\d+)", second).group(1)) > int(found.group(1))
    if found := re.search(r"only on a (\w+)\.", first):
        return not second.endswith(f"on a {found.group(1)}.")
    owner = re.search(r"and (\w+) has a key", first).group(1)
    return second.startswith(f"{owner} is not at work")


def test_statements_clash_where_the_answer_says_so():
    for difficulty, templates in (("easy", 2), ("medium", 4), ("hard", 5)):
        items = suite("inconsistency", n=100, difficulty=difficulty)
        assert len({one.meta["template"] for one in items}) == templates
        for one in items:
            first, second = one.meta["statements"]
            assert clash(first, second) == (one.answer == "No")
            assert first in one.prompt
            assert second in one.prompt


def test_the_right_glass_holds_what_the_tilted_one_does():
    for one in suite("spatial", n=40):
        radius, (low, high) = one.meta["radius"], one.meta["sides"]
        # The tilted water's height changes evenly across the glass: add up thin upright slices.
        x = (np.arange(4000) + 0.5) / 4000 * 2 * radius - radius
        height = low + (high - low) * (x + radius) / (2 * radius)
        volume = (height * 2 * np.sqrt(radius**2 - x**2)).sum() * 2 * radius / 4000
        held = [math.pi * r * r * h for r, h in one.meta["glasses"]]
        off = [abs(v / volume - 1) for v in held]
        assert "ABCD"[off.index(min(off))] == one.answer
        assert min(off) < 1e-3
        assert sorted(off)[1] > 0.25
        told = int(re.search(r"by (\d+) degrees", one.prompt).group(1))
        assert abs(math.tan(math.radians(told)) * 2 * radius - (high - low)) < 0.6


def test_sums_are_those_of_the_list():
    for one in suite("aggregate", n=40, difficulty="hard"):
        sums = Counter()
        lines = re.findall(r"Flat (\w), ([\w ]+): ([+-]\d)", one.prompt)
        assert len(lines) == 48
        assert len({(name, feature) for name, feature, _ in lines}) == 48
        for name, _, points in lines:
            sums[name] += int(points)
        (best, most), (_, second) = sums.most_common(2)
        assert best == one.answer
        assert most > second


def test_the_answer_is_the_same_glyph_turned_and_moved():
    from pluribus.tasks.sets import images
    from pluribus.tasks.suites.faces import rendered

    digits = images("digits")
    pixels = np.concatenate([digits.x_train, digits.x_test])
    labels = np.concatenate([digits.y_train, digits.y_test])
    items = suite("faces", n=25)
    near = 0
    for one in items:
        assert len(one.media) == 6
        assert all(image.shape == (32, 32) and image.dtype == np.uint8 for image in one.media)
        target, *shown = (image.astype(float) for image in one.media)
        far = [np.square(target - image).sum() for image in shown]
        near += "ABCDE"[far.index(min(far))] == one.answer
        assert min(far) > 0  # never the very same pixels
        assert len(set(one.meta["images"])) == 5
        assert {int(labels[i]) for i in one.meta["images"]} == {one.meta["class"]}
        own = pixels[one.meta["images"]["ABCDE".index(one.answer)]]
        assert (rendered(own, 32, 0.0, (0.0, 0.0)) == one.media[0]).all()
        turned = [
            rendered(own, 32, degrees, (dy, dx)).astype(float)
            for degrees in (-9.0, -7.0, -5.0, 5.0, 7.0, 9.0)
            for dy in (-0.4, 0.0, 0.4)
            for dx in (-0.4, 0.0, 0.4)
        ]
        found = [min(np.square(image - way).sum() for way in turned) for image in shown]
        assert "ABCDE"[found.index(min(found))] == one.answer
    assert near >= 15  # and 5 by chance: the other four are not told apart by eye alone


def test_rendering_turns_and_moves():
    from pluribus.tasks.suites.faces import rendered

    image = np.zeros((8, 8), np.uint8)
    image[1, 3] = 16
    same = rendered(image, 8, 0.0, (0.0, 0.0))
    assert same[1, 3] == 255
    assert same.sum() == 255
    assert rendered(image, 8, 0.0, (2.0, 1.0))[3, 4] == 255
    quarter = rendered(image, 8, 90.0, (0.0, 0.0))
    assert quarter.sum() == pytest.approx(255, abs=4)
    assert np.unravel_index(quarter.argmax(), (8, 8)) in {(3, 6), (4, 1)}
