"""The commands in the README and the notebook are ones that the command line understands."""

import ast
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from coatnet_jax.config import flat, parse_training_flags
from coatnet_jax.main import TRAINING, _parser
from coatnet_jax.stage import FREE_KEYS

ROOT = Path(__file__).parents[1]


def commands_in(text: str) -> list[str]:
    """Every `coatnet-jax …` line of a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.split("&&")[-1].strip().removeprefix("!") for line in lines]
    return [line for line in found if line.startswith("coatnet-jax ")]


def notebook_commands(model: str = "micro", **given: str) -> list[str]:
    """Those of the notebook's cells, with what the cells assign to the names in braces; `given`
    takes the place of what they assign."""
    cells = json.loads((ROOT / "colab" / "coatnet_jax.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names: dict[str, str] = {}
    python = re.sub(r"^( *)[!%].*", r"\1pass", text.replace("\\\n", " "), flags=re.MULTILINE)
    for node in ast.parse(python).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name | ast.Tuple):
            exec(compile(ast.Module([node], []), "notebook", "exec"), names)
            names |= {"MODEL": model, **given}
    return [line.format_map(names) for line in commands_in(text)]


def commands() -> list[str]:
    """Every `coatnet-jax …` line of the README's code blocks and the notebook's cells."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    notebook = notebook_commands("micro") + notebook_commands("coatnet_0", WORDS=",bf16")
    return commands_in("\n".join(blocks)) + notebook


def test_there_are_commands_to_check():
    assert {shlex.split(line)[1] for line in commands()} >= {
        "demo", "prepare", "pretrain", "embed", "finetune", "evaluate", "predict",
    }  # fmt: skip


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_documented_command_is_understood(line):
    name, *argv = shlex.split(line, comments=True)[1:]
    config, _ = understood(name, argv)
    if name in TRAINING:
        assert config.stage == name


def test_notebook_takes_paths_with_spaces():
    given = [
        shlex.split(line)[1:] for line in notebook_commands(ZIP="/My Drive/a.zip", RUNS="/My Drive")
    ]
    assert ["prepare", "/My Drive/a.zip"] in given
    trained = [understood(name, argv) for name, *argv in given if name in TRAINING]
    assert [str(workdir) for _, workdir in trained] == ["/My Drive/pretrain", "/My Drive/finetune"]
    assert trained[1][0].init_from == "/My Drive/pretrain"
    for command in ("embed", "evaluate", "predict"):
        runs = [_parser().parse_args(argv) for argv in given if argv[0] == command]
        run = runs[-1].paths[0] if command == "predict" else runs[-1].run_dir
        assert run == f"/My Drive/{'pretrain' if command == 'embed' else 'finetune'}"


def test_notebook_trains_coatnet_0_as_the_published_run(tmp_path):
    def configs(lines):
        """{stage: its keys and values}, of the first of a stage, without what changes no result."""
        found = {}
        for name, *argv in lines:
            if name in TRAINING and name not in found:
                config, _ = understood(name, argv)
                values = flat(config.to_dict())
                other = (*FREE_KEYS, "init_from", "model.dtype")
                found[name] = {k: v for k, v in values.items() if k not in other}
        return found

    (tmp_path / "faces.tar").touch()
    published = given_by("on_gpu.sh", tmp_path, f"{tmp_path}/out", f"{tmp_path}/faces.tar")
    ours = [shlex.split(line)[1:] for line in notebook_commands("coatnet_0")]
    assert configs(ours) == configs(published) and len(configs(ours)) == 2


def test_documented_programs_are_there():
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    named = set(re.findall(r"benchmarks/\w+\.(?:py|sh)", "\n".join(texts)))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).is_file()]


def given_by(script: str, folder: Path, *words: str) -> list[list[str]]:
    """What the script in benchmarks/ gives to `coatnet-jax`, for which and for Python others stand
    in."""
    (folder / "bin").mkdir(parents=True)
    for name in ("coatnet-jax", "python"):
        stand_in = folder / "bin" / name
        stand_in.write_text(f'#!/bin/sh\necho "$*" >> {folder}/{name}.txt\n')
        stand_in.chmod(0o755)
    subprocess.run(
        [ROOT / "benchmarks" / script, *words],
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        check=True,
    )
    return [line.split() for line in (folder / "coatnet-jax.txt").read_text().splitlines()]


def understood(name: str, argv: list[str]):
    """(config, workdir) of a training's command; None, None of another that is understood."""
    if name in TRAINING:
        return parse_training_flags(argv, default=name)
    _parser().parse_args([name, *argv])
    return None, None


def test_script_for_a_cpu_is_understood(tmp_path):
    given = given_by("on_cpu.sh", tmp_path, f"{tmp_path}/runs", "faces.tar")
    assert given[0] == ["prepare", "faces.tar"] and given[-1][0] == "release"
    sizes = []
    for name, *argv in given:
        config, workdir = understood(name, argv)
        if name in TRAINING:
            sizes.append((workdir.name, *config.progressive) if name == "finetune" else ())
    assert sizes == [
        (), ("b", 48, 64, 96), ("c", 80, 96, 112), ("e", 96, 112), ("f", 112, 128), ("k", 144, 160),
        ("l",), ("m",), ("n",), ("w",),
    ]  # fmt: skip


def test_script_for_a_gpu_is_understood(tmp_path):
    (tmp_path / "faces.tar").touch()
    given = given_by("on_gpu.sh", tmp_path, f"{tmp_path}/out", f"{tmp_path}/faces.tar")
    trained = {}
    for name, *argv in given:
        config, workdir = understood(name, argv)
        if config is not None:
            trained[workdir.name] = (config.model.name, config.model.image_size, config.epochs)
    assert trained == {
        "pretrain": ("coatnet_0", 64, 30),
        "finetune": ("coatnet_0", 128, 100),
        "taught": ("coatnet_micro", 128, 30),
    }
    assert [argv[1:] for argv in given if argv[0] == "release"] == [
        [f"{tmp_path}/out/finetune", f"--out={tmp_path}/out/released", "--max-mb=12"]
    ]
