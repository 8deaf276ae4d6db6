"""Run the real mergekit on recipes; for its interpreter (MERGEKIT_PYTHON), not ours.

    mergekit_oracle.py JOBS.json

JOBS maps a name to {"yaml": text, "multi": bool}. Each result is a model folder of that name in
`theirs` beside JOBS, or a text file `NAME.error`. Paths in recipes start from the folder of JOBS.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.scripts import multimerge


def single(text: str, out: Path) -> None:
    """Run one recipe as mergekit-yaml does, without the card that asks the hub."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(
        write_model_card=False, quiet=True, allow_crimes=True, random_seed=7, copy_tokenizer=True
    )
    run_merge(config, str(out), options)


def several(text: str, out: Path) -> None:
    """Run documents as mergekit-multi does."""
    path = out.with_suffix(".multi.yml")
    path.write_text(text)
    steps = out.with_suffix(".steps")
    arguments = [str(path), "-I", str(steps), "--out-path", str(out), "--no-write-model-card"]
    result = CliRunner().invoke(multimerge.main, [*arguments, "--allow-crimes", "--quiet"])
    if result.exception is not None:
        raise result.exception


def main(path: Path) -> None:
    """Run every job."""
    os.chdir(path.parent)
    (path.parent / "theirs").mkdir()
    for name, job in json.loads(path.read_text()).items():
        out = path.parent / "theirs" / name
        try:
            (several if job["multi"] else single)(job["yaml"], out)
        except Exception:
            out.with_name(f"{name}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
