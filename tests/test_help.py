"""What the command line says of itself: quickly, and true."""

import ast
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coatnet_jax.config import load_config, parse_training_flags
from coatnet_jax.main import main
from configs import finetune, pretrain

ROOT = Path(__file__).parents[1]


def said(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "other"),
    [("pretrain:strong,cpu,lars", "pretrain:micro"), ("finetune:cpu,atto", "finetune:coatnet_0")],
)
def test_help_of_a_training_lists_the_keys_and_values_of_the_config(words, other, capsys):
    stage = words.partition(":")[0]
    text = said(capsys, stage, "--config", words, "--help")
    listed = dict(re.findall(r"^    --config\.(\S+)  +(.+)$", text, re.MULTILINE))
    assert len(listed) > 30
    # Given to another config, they make that one of it.
    flags = [f"--config.{key}={ast.literal_eval(value)}" for key, value in listed.items()]
    config, _ = parse_training_flags([f"--config={other}", *flags, "--workdir=w"], default="")
    assert load_config(other).to_dict() != config.to_dict() == load_config(words).to_dict()


def test_help_of_a_training_says_what_the_words_are(capsys):
    for stage, module in (("pretrain", pretrain), ("finetune", finetune)):
        text = said(capsys, stage, "-h")
        for word in (*module.WORDS, *getattr(module, "METHODS", ())):
            assert re.search(rf"^    (\w+, )*{word}\b|[ ;]{word}[, ]", text, re.MULTILINE), word
        assert re.search(r"--workdir WORKDIR +.*\(required\)", text)
        assert f"--config={stage}." in text  # whose values are listed
    commands = " ".join(said(capsys, "--help").split())
    assert "self-supervised pre-training (SimCLR unless another method is named)" in commands


def test_version_is_that_of_the_package(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said(capsys, "--version") == f"coatnet-jax {project['version']}\n"


def test_a_terminal_without_our_characters_is_written_to(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code and b"--workdir=?" in stream.buffer.getvalue()


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["pretrain", "--help"]])
def test_help_and_version_do_not_wait_for_jax(argv):
    code = f"import sys; from coatnet_jax.main import _run\ntry:\n    _run({argv})\n"
    code += "finally:\n    sys.stderr.write(str('jax' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout and done.stderr == "False"


@pytest.mark.parametrize(
    ("splits", "reason"),
    [(["mine"], "--splits=mine: give a name"), (["a=1.csv", "a=2.csv"], "a is 1.csv already")],
)
def test_splits_without_a_name_of_their_own_are_refused(splits, reason, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "nowhere.zip", *(f"--splits={pair}" for pair in splits)])
    assert reason in capsys.readouterr().err
