import subprocess
import sys

import numpy as np
import pytest

from pluribus.core.errors import FormatError, MissingError
from pluribus.tasks.sets import DataError, cache_folder, images


def small(**changes):
    arrays = {
        "x_train": np.full((3, 2, 2), 7, np.uint8),
        "y_train": np.array([0, 1, 1]),
        "x_test": np.zeros((2, 2, 2), np.uint8),
        "y_test": np.array([1, 0]),
        "classes": np.array(["no", "yes"]),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **small(**changes))


def test_digits_need_no_folder(own_folders):
    digits = images("digits")
    assert digits.x_train.shape == (1437, 8, 8)
    assert digits.x_test.shape == (360, 8, 8)
    assert digits.x_train.dtype == np.uint8
    assert digits.peak == 16
    assert digits.classes == tuple("0123456789")
    assert set(digits.y_train) == set(digits.y_test) == set(range(10))


def test_embedded_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    stored, original = images("digits"), datasets.load_digits()
    rows = np.concatenate([stored.x_train, stored.x_test]).reshape(-1, 64)
    labels = np.concatenate([stored.y_train, stored.y_test])
    ours = sorted(map(bytes, np.column_stack([rows, labels])))
    theirs = np.column_stack([original.data, original.target]).astype(np.uint8)
    assert ours == sorted(map(bytes, theirs))


def test_looks_in_the_users_folder_before_the_cache(own_folders):
    data, cache = own_folders
    write(cache / "data" / "vision" / "tiny.npz")
    assert images("tiny").peak == 7
    write(data / "tiny.npz", x_train=np.full((3, 2, 2), 9, np.uint8))
    assert images("tiny").peak == 9
    write(data / "vision" / "tiny.npz", x_train=np.full((3, 2, 2), 8, np.uint8))
    assert images("tiny").peak == 8


def test_cache_folder_defaults_to_the_home_folder(monkeypatch):
    monkeypatch.delenv("PLURIBUS_CACHE", raising=False)
    assert cache_folder().parts[-2:] == (".cache", "pluribus")


def test_missing_set_says_where_it_looked_and_what_to_set(own_folders):
    data, cache = own_folders
    write(data / "vision" / "mnist.npz")
    with pytest.raises(DataError) as caught:
        images("mnits")
    text = str(caught.value)
    assert f"vision/mnits.npz and mnits.npz in {data} and {cache / 'data'}" in text
    assert "found there or embedded: digits, mnist" in text
    assert "Did you mean 'mnist'?" in text
    assert "Set PLURIBUS_DATA to a folder" in text
    assert isinstance(caught.value, MissingError)


def test_missing_set_says_that_no_folder_is_set(own_folders, monkeypatch):
    monkeypatch.delenv("PLURIBUS_DATA")
    with pytest.raises(DataError, match="PLURIBUS_DATA is not set"):
        images("mnist")


@pytest.mark.parametrize("name", ["../secret", "/secret", "vision/../../secret"])
def test_a_name_is_not_a_path(own_folders, name):
    data, _ = own_folders
    write(data / "vision" / "mnist.npz")
    write(data.parent / "secret.npz")
    with pytest.raises(DataError):
        images(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks the arrays y_test"),
        ({"x_train": np.zeros((3, 2, 2))}, r"x_train is float64\[3, 2, 2\] with 3 labels"),
        ({"y_train": np.array([0, 1])}, "with 2 labels"),
        ({"y_test": np.array([0, 2])}, "y_test spans 0..2 but there are 2 classes"),
        ({"y_test": np.array([0, -1])}, "y_test spans -1..0"),
        ({"classes": np.array(["no", None])}, "not a readable .npz"),
    ],
)
def test_refuses_a_malformed_set(own_folders, changes, message):
    data, _ = own_folders
    write(data / "bad.npz", **changes)
    with pytest.raises(FormatError, match=message):
        images("bad")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_refuses_what_is_no_npz(own_folders, content):
    data, _ = own_folders
    data.mkdir()
    (data / "bad.npz").write_bytes(content)
    with pytest.raises(FormatError, match="not a readable"):
        images("bad")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "gtsrb", "digits8x8", "usps", "omniglot"])
def test_reads_the_real_sets(real_data, name):
    found = images(name)
    assert len(found.x_train) > len(found.x_test) or name == "usps"
    assert found.y_train.max() + 1 == len(found.classes)


def test_package_and_sets_import_no_torch():
    code = "import sys, pluribus.tasks, pluribus.tasks.sets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
