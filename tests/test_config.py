"""Configs by name and path, flags on top, and errors in one line."""

import ml_collections
import pytest

from coatnet_jax import models
from coatnet_jax.config import (
    flat_keys,
    load_config,
    parse_training_flags,
    read_config,
    save_config,
)
from coatnet_jax.main import main
from configs import finetune, pretrain


def parse(*argv):
    return parse_training_flags(list(argv), default="pretrain")


def test_config_by_name_with_flags_on_top():
    config, workdir = parse(
        "--config=pretrain:atto,drawn",
        "--config.optim.lr=0.5",
        "--config.augment.crop=(0.2, 0.9)",
        "--workdir",
        "some/folder",
    )
    assert config.model.name == "coatnet_atto" and config.data.name == "drawn"
    assert config.optim.lr == 0.5 and config.augment.crop == (0.2, 0.9)
    assert str(workdir) == "some/folder"


def test_home_is_meant_by_a_tilde_that_the_shell_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("--workdir=~/run", "--config.data.root=~/data")
    config, workdir = parse("--config=pretrain:atto", *flags, "--config.init_from=~/before")
    assert workdir == tmp_path / "run" and config.init_from == str(tmp_path / "before")
    assert config.data.root == str(tmp_path / "data")
    for command in (["compare", "~/a", "~/b"], ["release", "~/a", "--out=~/b"]):
        with pytest.raises(SystemExit):
            main(command)
        assert f" {tmp_path}/a" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--no-detect", "~nobody-here/x.jpg"],
        ["prepare", "~nobody-here/x"],
        ["prepare", "{there}/in", "--labels=~nobody-here/x"],
        ["prepare", "{there}/in", "--splits=a=~nobody-here/x"],
        ["explore", "--root=~nobody-here/x"],
        ["import-timm", "~nobody-here/x", "--workdir={there}/x"],
        ["pretrain", "--config.data.root=~nobody-here/x", "--workdir={there}/x"],
        ["finetune", "--config.distill.teachers=~nobody-here/x", "--workdir={there}/x"],
    ],
)
def test_home_of_nobody_is_told_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COATNET_JAX_HOME", str(tmp_path / "home"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/20.jpg").touch()
    with pytest.raises(SystemExit) as end:
        main([word.format(there=tmp_path) for word in command])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1 and "~nobody-here/x" in error


def test_config_by_path(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n    return ml_collections.ConfigDict({'stage': 'pretrain', 'a': 1})\n"
    )
    config, _ = parse(f"--config={path}", "--config.a=2", "--workdir=x")
    assert config.a == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.optim.lrr=1", "--workdir=x"], "did you mean --config.optim.lr"),
        (["--config=pretrain:micro,dawn", "--workdir=x"], "'dawn' is not one of"),
        (["--config=pretrian", "--workdir=x"], "shipped ones: finetune, pretrain"),
        (["--config=/no/such.py", "--workdir=x"], "no config '/no/such.py'"),
        (["--config.epochs=many", "--workdir=x"], "many"),
        (["--config.augment.crop[0]=0.5", "--workdir=x"], "in: augment.crop[0]"),
        (["--wrkdir=x"], "did you mean --workdir"),
        ([], "--workdir=FOLDER is missing"),
        (["what", "--workdir=x"], "unexpected argument 'what'"),
    ],
)
def test_bad_flags_are_explained_in_one_line(argv, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "tune"])
def test_an_unknown_word_has_the_status_of_argparse_and_a_wrong_value_has_not(command, capsys):
    for word, status in (
        ("--bogus=1", 2),
        ("--config.optim.lrr=1", 2),
        ("bogus", 2),
        ("--config.epochs=many", 1),
        ("--config=bogus", 1),
    ):
        with pytest.raises(SystemExit) as end:
            main([command, word, "--workdir=x"])
        error = capsys.readouterr().err
        assert (end.value.code, error.count("\n")) == (status, 1), (word, error)
    with pytest.raises(SystemExit) as end:
        main(["predict", "--bogus=1", "a.jpg"])
    assert end.value.code == 2  # argparse's own


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "words", ["micro", "coatnet_0,bf16", "atto,drawn,tiny", "micro,cpu", "resnet50", "vit_s16,cpu"]
)
def test_every_shipped_word_gives_a_config_that_round_trips(stage, words, tmp_path):
    config = load_config(f"{stage}:{words}")
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config
    assert config.stage == stage


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_words_come_in_any_order_with_one_model_at_most(stage):
    expected = load_config(f"{stage}:atto,cpu,bf16")
    assert (expected.model.name, expected.model.dtype) == ("coatnet_atto", "bfloat16")
    for words in ("cpu,atto,bf16", "bf16,cpu,atto"):
        assert load_config(f"{stage}:{words}") == expected
    assert load_config(f"{stage}:cpu") == load_config(f"{stage}:micro,cpu")
    with pytest.raises(ValueError, match=f"{stage} config: atto and resnet50 are two models"):
        load_config(f"{stage}:atto,cpu,resnet50")
    with pytest.raises(ValueError, match=f"{stage} config 'cpu,mikro': 'mikro' is not one of mi"):
        load_config(f"{stage}:cpu,mikro")


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_every_backbone_is_a_word_of_the_configs(stage):
    assert {stage.get_config(model).model.name for model in stage.MODELS} == set(models.BACKBONES)


def test_early_layers_are_spared_only_where_they_were_trained_elsewhere():
    decay = {
        words: load_config(f"finetune:{words}").optim.layer_decay
        for words in ("micro", "coatnet_0", "resnet50", "resnet50,cpu", "coatnet_rmlp_1_rw")
    }
    *own, timm = decay.values()
    assert own == [1.0] * 4 and timm == 0.75


def test_flat_keys_are_dotted():
    config = ml_collections.ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": 3}}})
    assert flat_keys(config) == ["a", "b.c", "b.d.e"]
