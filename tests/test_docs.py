"""The commands in the README and the notebook are ones that the command line understands."""

import json
import re
import shlex
from pathlib import Path

import pytest

from coatnet_jax.config import parse_training_flags
from coatnet_jax.main import TRAINING, _parser

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """Every `coatnet-jax …` line of the README's code blocks and the notebook's cells."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    cells = json.loads((ROOT / "colab" / "coatnet_jax.ipynb").read_text())["cells"]
    blocks += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("&&")[-1].strip().removeprefix("!") for line in lines]
    return [line for line in found if line.startswith("coatnet-jax ")]


def test_there_are_commands_to_check():
    assert {shlex.split(line)[1] for line in commands()} >= {
        "demo", "prepare", "pretrain", "embed", "finetune", "evaluate", "predict",
    }  # fmt: skip


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_documented_command_is_understood(line):
    name, *argv = shlex.split(line, comments=True)[1:]
    if name in TRAINING:
        config, _ = parse_training_flags(argv, default=name)
        assert config.stage == name
    else:
        _parser().parse_args([name, *argv])
