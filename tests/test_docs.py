"""The commands in the README and the notebook are ones that the command line understands."""

import json
import os
import re
import shlex
import subprocess
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


def test_script_of_the_released_model_is_understood(tmp_path):
    """Its commands, as a stand-in for `coatnet-jax` is given them."""
    stand_in = tmp_path / "bin" / "coatnet-jax"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/given\n')
    stand_in.chmod(0o755)
    subprocess.run(
        [ROOT / "benchmarks" / "released_model.sh", tmp_path / "runs", "faces.tar"],
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
        check=True,
    )
    given = [line.split() for line in (tmp_path / "given").read_text().splitlines()]
    assert given[0] == ["prepare", "faces.tar"] and given[-1][0] == "release"
    sizes = []
    for name, *argv in given:
        if name in TRAINING:
            config, workdir = parse_training_flags(argv, default=name)
            sizes.append((workdir.name, *config.progressive) if name == "finetune" else ())
        else:
            _parser().parse_args([name, *argv])
    assert sizes == [
        (), ("b", 48, 64, 96), ("c", 80, 96, 112), ("e", 96, 112), ("f", 112, 128), ("k", 144, 160),
        ("l",), ("m",), ("n",),
    ]  # fmt: skip
