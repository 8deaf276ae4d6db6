import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pluribus.core.weights import Weights

SCRIPT = Path(__file__).with_name("fuzz.py")


@pytest.fixture(scope="module")
def fuzz():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_broken_files_raise_only_our_errors(fuzz, tmp_path):
    seen, slowest, failed = fuzz["run"](range(100_000, 100_600), tmp_path)
    assert failed == []
    assert slowest < 1
    for suffix in fuzz["KINDS"]:  # both what is broken and what is whole by luck
        assert seen[suffix, "FormatError"] > 50
        assert seen[suffix, "opened"] > 5


def test_the_generators_make_whole_files_when_nothing_is_tampered(fuzz, tmp_path):
    pickled, records = fuzz["_dump"](fuzz["random"].Random(1))
    path = tmp_path / "m.pt"
    with fuzz["zipfile"].ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        for number, data in enumerate(records):
            archive.writestr(f"m/data/{number}", data)
    weights = Weights.open(path)
    assert [weights.source(n).spec.nbytes for n in "abcd"] == [len(data) for data in records]


@pytest.mark.slow
def test_the_script_reports(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--n", "60"], capture_output=True, text=True, check=True
    )
    assert "0 broke the rules" in done.stdout
