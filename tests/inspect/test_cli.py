import json

import pytest
from typer.testing import CliRunner

from pluribus.cli import build


@pytest.fixture
def folders(tmp_path):
    import numpy as np

    from pluribus.core.weights import Weights

    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 30)).astype(np.float32)
    for name in ("base", "code", "<i>prose"):
        (tmp_path / name).mkdir()
        step = 0 if name == "base" else rng.standard_normal(base.shape) * 0.05
        values = (base + step).astype(np.float32)
        Weights.of({"layers.0.w": values, "layers.1.w": values * 2}).save(
            tmp_path / name / "model.safetensors"
        )
    return [str(tmp_path / name) for name in ("base", "code", "<i>prose")]


def run(*arguments):
    return CliRunner().invoke(build(), ["inspect", *arguments])


def test_text_page_and_json_agree(folders, tmp_path):
    page = tmp_path / "report.html"
    text = run(*folders, "--html", str(page))
    assert text.exit_code == 0, text.output
    told = json.loads(run(*folders, "--json", "--threads", "1", "--memory", "8MB").stdout)
    assert f"{told['model']['cosine'][1][0]:.3f}" in text.stdout
    assert "&lt;i&gt;prose" in page.read_text("utf-8")
    assert "<i>prose" not in page.read_text("utf-8")
    assert str(page) in text.stdout


def test_base_may_be_named(folders):
    base, *experts = folders
    named = json.loads(run("--base", base, *experts, "--json").stdout)
    assert named["base"] == base
    assert named["experts"] == experts
    assert named["model"] == json.loads(run(*folders, "--json").stdout)["model"]


def test_base_alone_is_refused(folders):
    found = run(folders[0])
    assert found.exit_code != 0
    assert "at least one expert" in str(found.exception)


def test_help_has_an_example():
    assert "Example: pluribus inspect base/ code/ prose/" in run("--help").stdout
