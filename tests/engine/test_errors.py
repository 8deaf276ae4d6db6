"""What can go wrong with inputs and disks: said in words, and nothing that existed is harmed."""

import errno
import os
import struct

import numpy as np
import pytest
import torch

from pluribus.core.errors import FormatError, InputError, MismatchError, NonFiniteError, OutputError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine import blocks, sink
from pluribus.engine.driver import merge, size_of
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties

MODEL = {"a": (60, 50), "b": (11,), "c": (7, 3)}


def beside(folder):
    """Everything in a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- the output ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_existing_output_is_left_alone(models, tmp_path, name):
    pool = models.write(2)
    out = tmp_path / name
    merge(pool, Linear(), out)
    before = beside(tmp_path)
    with pytest.raises(OutputError, match=r"exists already; choose another name, or pass --overw"):
        merge(pool, Ties(), out)
    assert beside(tmp_path) == before


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(
    models, tmp_path, monkeypatch, small_blocks
):
    pool = models.write(2)
    out = tmp_path / "out"
    merge(pool, Linear(), out)
    before = beside(out)
    original, seen = sink.FileSink.write, []

    def write(self, job, block, raw):
        seen.append(beside(out) == before)
        original(self, job, block, raw)

    monkeypatch.setattr(sink.FileSink, "write", write)
    merge(pool, Ties(density=0.5), out, overwrite=True)
    assert seen
    assert all(seen)
    assert beside(out) != before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_overwriting_replaces_a_folder_as_a_whole(models, tmp_path):
    pool = models.write(2)
    merge(pool, Linear(), tmp_path / "out", max_shard_size=500)
    merge(pool, Ties(), tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_overwriting_refuses_a_folder_that_is_no_model(models, tmp_path):
    pool = models.write(2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(OutputError, match="other things than a model"):
        merge(pool, Linear(), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_folder_where_the_output_would_be_prepared_is_not_emptied(models, tmp_path):
    pool = models.write(2)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="holds something else"):
        merge(pool, Linear(), tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "keep"


def test_one_of_the_inputs_can_be_overwritten(models, tmp_path, raw_bytes):
    pool = models.write(2)
    wanted = raw_bytes(merge(pool, Linear()))
    got = merge(pool, Linear(), tmp_path / "e0", overwrite=True)
    assert raw_bytes(got) == wanted
    assert raw_bytes(Weights.open(tmp_path / "e0")) == wanted


def test_a_missing_parent_folder_is_named(models, tmp_path):
    with pytest.raises(OutputError, match=r"nowhere: no such folder to write out into; create it"):
        merge(models.write(2), Linear(), tmp_path / "nowhere" / "out")


def test_a_folder_that_cannot_be_written_to(models, tmp_path, tiny_disk):
    """Root may write everywhere but to a filesystem that is mounted read-only."""
    where = tmp_path / "locked"
    where.mkdir(mode=0o555)
    if os.access(where, os.W_OK):
        where = tiny_disk("1m", "ro")
    with pytest.raises(OutputError, match=r"out\.partial: (Read-only|Permission)"):
        merge(models.write(2), Linear(), where / "out")
    assert not list(where.iterdir())


# -- full disks ------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_anything_is_read(
    models, tmp_path, tiny_disk, monkeypatch
):
    pool = models.write(2, {"w": (500, 800)})
    where = tiny_disk("1m")
    monkeypatch.setattr(blocks.Reader, "read", None)
    with pytest.raises(OutputError, match=r"needs 0\.00 GB, but only 0\.00 GB are free"):
        merge(pool, Linear(), where / "out")
    assert not list(where.iterdir())


def test_a_disk_that_fills_while_room_is_set_aside(models, tmp_path, tiny_disk, monkeypatch):
    """Somebody else takes the space between the check and the allocation."""
    pool = models.write(2, {"w": (500, 800)})
    where = tiny_disk("1m")
    monkeypatch.setattr(
        sink.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 40})
    )
    with pytest.raises(OutputError, match="no space left on the disk; free some and run the same"):
        merge(pool, Linear(), where / "out")
    assert not list(where.iterdir())


class Full:
    """Makes one system call fail for want of space until `open` is called."""

    def __init__(self, monkeypatch, name, after):
        self.monkeypatch, self.name, self.original = monkeypatch, name, getattr(os, name)
        self.left = after
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.original(*arguments)

    def free(self):
        self.monkeypatch.setattr(os, self.name, self.original)


@pytest.mark.parametrize(("call", "after"), [("pwrite", 0), ("pwrite", 25), ("write", 6)])
def test_a_disk_that_fills_during_the_run(
    models, tmp_path, monkeypatch, small_blocks, sha, call, after
):
    pool = models.write(2, MODEL)
    (tmp_path / "whole").mkdir()
    merge(pool, Ties(density=0.3), tmp_path / "whole" / "out")
    full = Full(monkeypatch, call, after)
    with pytest.raises(OutputError, match=r"out\.partial: no space left on the disk; free some"):
        merge(pool, Ties(density=0.3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    full.free()
    merge(pool, Ties(density=0.3), tmp_path / "out")
    assert sha(tmp_path / "out") == sha(tmp_path / "whole" / "out")


def test_a_journal_line_that_fits_only_in_part(models, tmp_path, monkeypatch, small_blocks, sha):
    """The kernel takes some bytes of a write and refuses the rest."""
    pool = models.write(2, MODEL)
    (tmp_path / "whole").mkdir()
    merge(pool, Linear(), tmp_path / "whole" / "out")
    original, calls = os.write, []

    def write(fd, data):
        calls.append(fd)
        if len(calls) == 5:
            return original(fd, data[: len(data) // 2])
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError, match="no space left"):
        merge(pool, Linear(), tmp_path / "out", threads=1)
    monkeypatch.setattr(os, "write", original)
    merge(pool, Linear(), tmp_path / "out")
    assert sha(tmp_path / "out") == sha(tmp_path / "whole" / "out")


def test_a_real_full_disk_and_space_again(models, tmp_path, tiny_disk, sha, small_blocks):
    """The small files no longer fit; once there is room the same command only publishes."""
    pool = models.write(2, MODEL)
    (tmp_path / "whole").mkdir()
    merge(pool, Linear(), tmp_path / "whole" / "out")
    where = tiny_disk("64k")
    (where / "ballast").write_bytes(bytes(36 << 10))
    with pytest.raises(OutputError, match="no space left on the disk"):
        merge(pool, Linear(), where / "out")
    assert not (where / "out").exists()
    (where / "ballast").unlink()
    merge(pool, Linear(), where / "out")
    assert sha(where / "out") == sha(tmp_path / "whole" / "out")


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("method", [Linear(), Ties(density=0.3, scope="model")])
def test_nan_and_infinity_are_named(models, tmp_path, small_blocks, bad, kind, method):
    pool = models.write(2, MODEL, [kind])
    odd = {name: tensor.clone() for name, tensor in pool.experts["e1"].items()}
    odd["a"].view(-1)[2999] = bad
    pool = Pool(pool.base, {"fine": pool.experts["e0"], "odd": Weights.of(odd, label="odd")})
    with pytest.raises(NonFiniteError, match=r"^odd: tensor 'a' holds NaN or infinite.*--allow-"):
        merge(pool, method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_the_base_is_named_too(models):
    pool = models.write(2)
    odd = {name: tensor.clone() for name, tensor in pool.base.items()}
    odd["one"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^bad base: tensor 'one'"):
        merge(Pool(Weights.of(odd, label="bad base"), pool.experts), Ties())


def test_nan_goes_through_on_request(models, small_blocks):
    pool = models.write(2, {"w": (300,)})
    odd = pool.experts["e1"]["w"].clone()
    odd[7] = float("nan")
    pool = Pool(None, [pool.experts["e0"], {"w": odd}])
    got = merge(pool, Linear(), allow_nonfinite=True)["w"]
    assert torch.isnan(got).nonzero().tolist() == [[7]]


def test_nan_in_a_base_that_is_ignored_does_not_matter(models):
    pool = models.write(2)
    odd = {name: tensor.clone() * float("nan") for name, tensor in pool.base.items()}
    merge(Pool(odd, pool.experts), Linear())


def test_an_input_cut_off_in_the_middle_of_the_run(models, tmp_path, small_blocks, monkeypatch):
    pool = models.write(2, MODEL)
    file = models.folder / "e1" / "model.safetensors"
    size = file.stat().st_size
    original, reads = blocks.Reader.read, []

    def read(self, *arguments, **options):
        reads.append(0)
        if len(reads) == 10:
            os.truncate(file, size // 2)
        return original(self, *arguments, **options)

    monkeypatch.setattr(blocks.Reader, "read", read)
    with pytest.raises(FormatError, match=r"e1/model\.safetensors: ends at byte .* truncated"):
        merge(pool, Linear(), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_cut_off_is_refused_at_once(models):
    pool = models.write(2)
    file = models.folder / "e1" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(FormatError, match="truncated"):
        Pool(models.folder / "base", [models.folder / "e1"])
    assert pool


def test_a_header_with_another_length_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(FormatError, match="header of 1099511627776 bytes in a file of 10"):
        Pool(None, [path])


# -- pools that do not fit -------------------------------------------------------------------------


def weights(label, **tensors):
    return Weights.of(
        {name.replace("__", "."): tensor for name, tensor in tensors.items()}, label=label
    )


def test_missing_names_come_with_the_nearest():
    base = weights("base", layer__q_proj=torch.ones(2), norm=torch.ones(2))
    other = weights("other", layer__q_prj=torch.ones(2), norm=torch.ones(2))
    with pytest.raises(MismatchError) as caught:
        Pool(base, {"other": other})
    text = str(caught.value)
    assert "other lacks layer.q_proj, which base has." in text
    assert "Did you mean 'layer.q_prj'?" in text
    assert "other has layer.q_prj, which base lacks." in text


def test_many_missing_names_are_counted():
    base = weights("base", **{f"t{i}": torch.ones(1) for i in range(9)})
    with pytest.raises(MismatchError, match=r"lacks t1, t2, t3, t4, t5 and 3 more"):
        Pool(base, {"small": weights("small", t0=torch.ones(1))})


def test_both_shapes_are_told():
    base, other = weights("base", w=torch.ones(4, 3)), weights("other", w=torch.ones(3, 4))
    with pytest.raises(
        MismatchError, match=r"'w' is F32\[4, 3\] in base, but F32\[3, 4\] in other"
    ):
        Pool(base, {"other": other})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.ones(3), torch.ones(3, dtype=torch.int64)),
        (torch.ones(3, dtype=torch.int64), torch.ones(3)),
        (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int32)),
        (torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.uint8)),
    ],
)
def test_whole_numbers_must_have_one_type(one, two):
    with pytest.raises(MismatchError, match=r"tensor 'w' is .*\[3\] in a, but .*\[3\] in b"):
        Pool(weights("a", w=one), {"b": weights("b", w=two)})


def test_float_types_may_differ():
    Pool(weights("a", w=torch.ones(3)), {"b": weights("b", w=torch.ones(3).half())})


def test_all_experts_are_checked_before_anything_is_read(models, monkeypatch):
    models.write(3)
    Weights.of({"stray": torch.ones(2)}).save(models.folder / "e2" / "model.safetensors")

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("pluribus.core.source.read_exactly", read)
    with pytest.raises(MismatchError, match="e2"):
        models.pool()


def test_no_experts():
    with pytest.raises(InputError, match="no experts were given"):
        Pool({"w": torch.ones(1)}, [])


def test_arrays_that_are_not_tensors():
    with pytest.raises(FormatError, match="'w' is list, not a tensor"):
        Pool(None, [{"w": [1.0]}])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512_000_000),
        ("5GB", 5_000_000_000),
        ("2GiB", 2 << 30),
        ("1000000", 1_000_000),
        ("1.5 kb", 1500),
        (7, 7),
    ],
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12 parsecs", "-", "1e", "nan", "inf", "-5GB", "0x10"])
def test_sizes_that_are_not(text):
    with pytest.raises(InputError, match="is not a size"):
        size_of(text)


def test_a_device_that_is_not_there(models):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="no CUDA device"):
        merge(models.write(2), Linear(), device="cuda")
    with pytest.raises(InputError, match="device 'teapot'"):
        merge(models.write(2), Linear(), device="teapot")


def test_torch_blocks_on_a_cpu_give_nearly_the_same(models):
    """The way a GPU goes, without one."""
    pool = models.write(3)
    one, two = merge(pool, Ties(density=0.4)), merge(pool, Ties(density=0.4), device="torch:cpu")
    for name in one:
        np.testing.assert_allclose(two[name].numpy(), one[name].numpy(), rtol=1e-6, atol=1e-7)
