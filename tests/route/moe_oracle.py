"""Run the real mergekit-moe on dense models; for its interpreter (MERGEKIT_PYTHON), not ours.

    moe_oracle.py JOBS.json

JOBS maps a name to the text of a recipe. Each result is a model folder of that name in `theirs`
beside JOBS, or a text file `NAME.error`. Paths in recipes start from the folder of JOBS. Hidden
states are taken in float32, where mergekit-moe loads the base in bfloat16; nothing else differs.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
import yaml
from mergekit.merge import MergeOptions
from mergekit.moe import router
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build


class Precise:
    """Opens models in float32 whatever is asked for."""

    @staticmethod
    def from_pretrained(path, **settings):
        settings.pop("torch_dtype", None)
        settings.pop("device_map", None)
        settings.pop("low_cpu_mem_usage", None)
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, **settings
        )


def main(path: Path) -> None:
    """Run every job."""
    os.chdir(path.parent)
    (path.parent / "theirs").mkdir()
    router.AutoModelForCausalLM = Precise
    for name, text in json.loads(path.read_text()).items():
        out = path.parent / "theirs" / name
        try:
            config = MoEMergeConfig.model_validate(yaml.safe_load(text))
            build(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False))
        except (Exception, SystemExit):
            out.with_name(f"{name}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
