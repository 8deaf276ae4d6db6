"""On a local Ray of two workers: the same bytes as on threads."""

import importlib.util
import logging
import os
import pickle
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import pluribus
from pluribus.core.chain import parse
from pluribus.core.errors import ExtraError, MismatchError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.engine import ray_run, sink
from pluribus.engine.driver import Options, execute, merge, plan_pool
from pluribus.engine.spans import Task
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties

SHAPES = {"a": (700, 900), "b": (11,), "c": (300_001,), "layers.0.w": (50, 9), "empty": (0,)}
SPANS = {"row": (1, (1 << 22) + 77), "tail": (5,)}
METHODS = [
    Linear(),
    Ties(density=0.2),
    Ties(density=0.2, scope="model", tie="global"),
    parse("trim(density=0.3, scope='model') >> elect >> mean"),
]

needs_ray = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two workers that lives for this file."""
    import ray

    source = str(Path(pluribus.__file__).parents[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200 << 20,
            runtime_env={"env_vars": {"PYTHONPATH": source}},
        )
        yield ray
        ray.shutdown()


@pytest.fixture
def by_ray(cluster):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield partial(merge, ray=True, threads=2)


class TestOnRay:
    pytestmark = needs_ray

    @pytest.mark.parametrize("method", METHODS, ids=str)
    def test_files_have_the_same_bytes(self, models, by_ray, sha, tmp_path, method):
        pool = models.write(2, SHAPES, ["BF16"])
        for name, run in (("threads", merge), ("ray", by_ray)):
            (tmp_path / name).mkdir()
            run(pool, method, tmp_path / name / "out", max_shard_size=1_000_000, seed=3)
        assert sha(tmp_path / "ray" / "out") == sha(tmp_path / "threads" / "out")

    def test_several_spans_of_one_tensor(self, models, by_ray, raw_bytes):
        pool = models.write(2, SPANS, ["BF16"])
        method = Ties(density=0.2)
        assert raw_bytes(by_ray(pool, method)) == raw_bytes(merge(pool, method))

    def test_weights_in_memory_and_lazy_ones(self, models, by_ray, raw_bytes):
        models.write(2)
        pool = models.in_memory()
        one, two = pool.experts.values()
        lazy = Pool(pool.base, [one * 0.5, two + one])
        method = Ties(density=0.5)
        assert raw_bytes(by_ray(lazy, method)) == raw_bytes(merge(lazy, method))

    def test_a_killed_run_goes_on(self, models, by_ray, sha, tmp_path, monkeypatch):
        """Begun on threads, gone on with on Ray, and the other way round."""
        pool = models.write(2, SHAPES, ["BF16"])
        method = METHODS[2]
        (tmp_path / "whole").mkdir()
        merge(pool, method, tmp_path / "whole" / "out")
        original = sink.FileSink.write
        for name, first, second in (("on ray", merge, by_ray), ("on threads", by_ray, merge)):
            left = [5]

            def write(self, job, block, raw, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyError("crash")
                original(self, job, block, raw)

            monkeypatch.setattr(sink.FileSink, "write", write)
            out = tmp_path / name
            with pytest.raises(KeyError, match="crash"):
                first(pool, method, out)
            monkeypatch.setattr(sink.FileSink, "write", original)
            assert not out.exists()
            second(pool, method, out)
            assert sha(out) == sha(tmp_path / "whole" / "out")

    def test_errors_come_back_as_they_are(self, models, by_ray):
        pool = models.write(2, {"w": (90,), "i": (4,)}, [{"w": "F32", "i": "I64"}])
        odd = {name: tensor.clone() for name, tensor in pool.experts["e1"].items()}
        odd["w"][5] = float("nan")
        bad = Pool(pool.base, {"e0": pool.experts["e0"], "odd": odd})
        with pytest.raises(NonFiniteError, match=r"^odd: tensor 'w' holds NaN"):
            by_ray(bad, Linear())
        odd = {**odd, "w": torch.ones(90), "i": torch.arange(4) + 1}
        with pytest.raises(MismatchError, match=r"^tensor 'i' .*whole numbers"):
            by_ray(Pool(pool.base, {"e0": pool.experts["e0"], "odd": odd}), Linear())

    def test_a_bug_in_a_method_keeps_its_type(self, models, by_ray):
        pool = models.write(2, {"w": (90,)})
        with pytest.raises(ValueError, match="2 values were given for 3") as caught:
            by_ray(Pool(pool.base, [*pool.experts.values(), pool.base]), Linear(weight=(1.0, 2.0)))
        assert "ray" not in type(caught.value).__module__

    def test_a_worker_that_dies_is_replaced(self, models, by_ray, raw_bytes, tmp_path):
        """The first worker to look at this source ends without a word."""
        pool = models.write(2, {"w": (900,), "v": (30, 4)})
        flag = tmp_path / "died"

        def once(values):
            if not flag.exists():
                flag.touch()
                os._exit(1)
            return values

        deadly = Pool(pool.base, [pool.experts["e0"].map(once), pool.experts["e1"]])
        got = raw_bytes(by_ray(deadly, Ties(density=0.5)))
        assert flag.exists()
        assert got == raw_bytes(merge(pool, Ties(density=0.5)))

    def test_progress_and_result(self, models, by_ray, tmp_path):
        pool = models.write(2, SHAPES)
        seen = []
        plan = plan_pool(pool, Ties(density=0.2, scope="model"))
        options = Options(ray=True)
        result = execute(
            plan, tmp_path / "out", options, lambda progress: seen.append(progress.done)
        )
        assert seen[-1] == result.bytes_read > 0


def test_without_ray_the_extra_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraError, match=r"--ray needs the package 'ray'.*pluribus\[ray\]"):
        merge(models.write(2), Linear(), ray=True)


def test_a_worker_hands_back_what_it_merged(models, oracle):
    """The far side of the wire, here."""
    pool = models.write(2, {"w": (300,)})
    plan = pickle.loads(pickle.dumps(plan_pool(pool, Linear())))
    actor = ray_run._Actor(plan, "cpu", False)
    told, blocks = actor.execute(Task(0, 0, {}, {}, True, True))
    states, digests = pickle.loads(told)
    assert states is None
    assert {len(hashes) for hashes in digests.values()} == {1}
    assert np.concatenate([raw for _, raw in blocks]).tobytes() == oracle(pool, Linear())["w"]
