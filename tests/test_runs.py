"""Whole runs on a few drawn faces: resume, start weights, the command line and its errors."""

import csv
import json
import shutil
import time
from functools import reduce
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from coatnet_jax import (
    embed,
    evaluate,
    finetune,
    inference,
    loop,
    optim,
    pretrain,
    release_weights,
    sharding,
    stage,
)
from coatnet_jax.checkpoint import FOLDER, load_variables
from coatnet_jax.config import load_config, parse_training_flags, read_config
from coatnet_jax.main import main
from coatnet_jax.teachers import teachers_answer
from input_pipeline.images import decode_image
from input_pipeline.pipeline import open_split
from input_pipeline.prepare import prepare


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(small_atto):
    small_atto(stage, inference)


def tiny(kind, root, *, words="", **changes):
    config = load_config(f"{kind}:atto,drawn,tiny{words}")
    config.data.root = str(root)
    config.batch_size = 16
    config.epochs = 1.2  # 8 steps of 7 an epoch: the batches run over the epoch's end
    config.monitor.every_epochs = 0.43  # every 3 steps
    config.model.image_size = 32
    if kind == "pretrain":
        config.projection.update(layers=2, hidden=16, out=8)
    config.update_from_flattened_dict(changes)
    return config


def same_weights(a, b):
    va, vb = load_variables(a, which="latest"), load_variables(b, which="latest")
    assert va[1] == vb[1]
    for x, y in zip(jax.tree.leaves(va[0]), jax.tree.leaves(vb[0]), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def pretrained(drawn_root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pretrain"
    assert pretrain.run(tiny("pretrain", drawn_root), workdir)
    return workdir


@pytest.fixture(scope="module")
def finetuned(drawn_root, pretrained):
    workdir = pretrained.parent / "finetune"
    assert finetune.run(tiny("finetune", drawn_root, init_from=str(pretrained)), workdir)
    return workdir


def test_a_run_leaves_no_compiled_step_behind(finetuned):
    # A search of a hundred runs would come to as many memory maps as Linux allows.
    for step in (pretrain.pretrain_train_step, finetune.finetune_train_step):
        assert step._cache_size() == 0


def in_place_of(jitted, function):
    """`function` with what a run asks of the jitted step that it stands for."""
    function.clear_cache = jitted.clear_cache
    return function


def kill_after(steps, monkeypatch):
    """Make the run die in the middle of a step, as a kill does: nothing gets saved."""
    shard_batch, count = loop.shard_batch, 0

    def dying(batch, mesh):
        nonlocal count
        count += 1
        if count > steps:
            raise RuntimeError("killed")
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", dying)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_and_resumed_equals_never_stopped(
    stage, drawn_root, pretrained, finetuned, tmp_path, monkeypatch
):
    run = {"pretrain": pretrain, "finetune": finetune}[stage].run
    init_from = str(pretrained) if stage == "finetune" else ""
    with monkeypatch.context() as patched:
        kill_after(5, patched)
        with pytest.raises(RuntimeError, match="killed"):
            run(tiny(stage, drawn_root, init_from=init_from), tmp_path / "run")
    # Two worker processes for the rest: they must give the same stream as none.
    assert run(
        tiny(stage, drawn_root, init_from=init_from, **{"data.workers": 2}), tmp_path / "run"
    )
    whole = {"pretrain": pretrained, "finetune": finetuned}[stage]
    same_weights(tmp_path / "run", whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_growing_views_resume_exactly_and_end_at_the_size_that_is_evaluated(
    drawn_root, tmp_path, monkeypatch, capsys
):
    def config():
        small = {"epochs": 0.72, "monitor.every_epochs": 0.29}  # 5 steps, saved every 2
        return tiny(
            "finetune", drawn_root, progressive=(32, 64), **small | {"model.image_size": 64}
        )

    evaluated, eval_view = [], inference.eval_view
    monkeypatch.setattr(
        inference,
        "eval_view",
        lambda x, **view: (evaluated.append(view["size"]), eval_view(x, **view))[1],
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finetune.run(config(), whole)
    with monkeypatch.context() as patched:
        kill_after(3, patched)
        with pytest.raises(RuntimeError, match="killed"):
            finetune.run(config(), run)
    assert finetune.run(config(), run)  # from step 2, in the middle of the first size's share
    same_weights(whole, run)
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    said = [x for x in capsys.readouterr().out.splitlines() if "px from here" in x]
    first, second = (
        f"[finetune] step {n}: views of {size} px from here" for n, size in ((1, 32), (4, 64))
    )
    assert said == [first, second, first, first.replace("step 1", "step 3"), second]
    assert set(evaluated) == {64}
    table = load_variables(whole)[0]["params"]["backbone"]["stage3_block0"]["attention"]
    assert table["relative_bias"].shape[0] == 7 * 7  # 4x4 tokens: those of 64 px
    with pytest.raises(ValueError, match="an image of 16x16 is too small"):
        finetune.run(tiny("finetune", drawn_root, progressive=(16, 32)), tmp_path / "other")
    with pytest.raises(ValueError, match="must grow from size to size and end with"):
        finetune.run(tiny("finetune", drawn_root, progressive=(32, 48)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["dino", pytest.param("byol", marks=pytest.mark.slow)])
def test_second_network_is_resumed_exactly(method, drawn_root, tmp_path, monkeypatch):
    def config():
        small = {"epochs": 0.72, "monitor.every_epochs": 0.29, "projection.hidden": 16}
        return tiny("pretrain", drawn_root, words=f",{method}", **small)  # 5 steps, saved every 2

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert pretrain.run(config(), whole)
    with monkeypatch.context() as patched:
        kill_after(3, patched)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain.run(config(), run)
    assert pretrain.run(config(), run)
    # All that the checkpoints hold, the target network and the centre among it.
    items = [saved_arrays(folder / "checkpoints" / "5") for folder in (whole, run)]
    assert items[0].keys() == items[1].keys()
    for item, arrays in items[0].items():
        for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(items[1][item]), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)
    online, served = items[0]["variables"]["params"], load_variables(whole, which="latest")[0]
    target = items[0]["ema_params"] if method == "dino" else items[0]["extra"]["target"]
    expected, other = (target, online) if method == "dino" else (online, target)
    for a, b in zip(jax.tree.leaves(served["params"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = ["backbone", "stem", "conv1", "kernel"]
    a, b = (reduce(lambda tree, key: tree[key], kernel, tree) for tree in (expected, other))
    assert np.abs(a - b).max() > 0


def saved_arrays(folder):
    """{item: arrays} of a checkpoint's folder, without its key."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return {
            item.name: checkpointer.restore(item)
            for item in folder.iterdir()
            if item.name in ("variables", "ema_params", "extra")
        }


def test_time_limit_stops_saves_and_resumes(drawn_root, pretrained, tmp_path, monkeypatch):
    config = tiny("pretrain", drawn_root, max_minutes=1e-6)
    stops = 0
    while not pretrain.run(config, tmp_path / "run"):
        stops += 1
    assert stops >= 5
    same_weights(tmp_path / "run", pretrained)


@pytest.mark.parametrize("cache", ["host", "device"])
def test_cached_images_train_the_same_weights(cache, drawn_root, pretrained, tmp_path, capsys):
    assert pretrain.run(tiny("pretrain", drawn_root, **{"data.cache": cache}), tmp_path / "run")
    same_weights(tmp_path / "run", pretrained)
    assert "decoded 112 of 112 images of train" in capsys.readouterr().out


def test_unknown_cache_and_too_little_memory_raise(drawn_root, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be one of .*'device'.*, not 'gpu'"):
        pretrain.run(tiny("pretrain", drawn_root, **{"data.cache": "gpu"}), tmp_path / "run")
    mesh = sharding.make_mesh(1)
    small = SimpleNamespace(
        local_devices=[SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1e6})]
    )
    pixels = np.zeros((20, 100, 100, 3), np.uint8)
    with pytest.raises(ValueError, match="20 images take 0.0 GB .* use --config.data.cache=host"):
        stage.with_resident_images(None, pixels, small)
    assert stage.with_resident_images(None, pixels, mesh)


def test_finished_run_is_left_as_it_is(drawn_root, pretrained):
    before = (pretrained / "metrics.jsonl").read_text()
    started = time.monotonic()
    assert pretrain.run(tiny("pretrain", drawn_root), pretrained)
    assert (pretrained / "metrics.jsonl").read_text() == before
    assert time.monotonic() - started < 60


def test_run_without_its_record_writes_it_anew(drawn_root, pretrained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(pretrained, workdir)
    (workdir / "run.json").unlink()
    assert pretrain.run(tiny("pretrain", drawn_root), workdir)
    assert json.loads((workdir / "run.json").read_text())["finished"] is True
    (workdir / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        pretrain.run(tiny("pretrain", drawn_root), workdir)


def test_damaged_checkpoint_is_named_and_kept(drawn_root, pretrained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(pretrained, workdir)
    newest = max((workdir / FOLDER).glob("[0-9]*"), key=lambda path: int(path.name))
    (described,) = (newest / "variables").glob("_METADATA")
    described.write_text("{")
    with pytest.raises(ValueError, match=f"{newest} cannot be read .*; it is damaged") as error:
        pretrain.run(tiny("pretrain", drawn_root), workdir)
    assert "\n" not in str(error.value) and described.is_file()


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_all_training_faces_and_no_others_are_trained_on(kind, drawn_root, tmp_path, monkeypatch):
    shard_batch, seen = loop.shard_batch, set()

    def watched(batch, mesh):
        seen.update(image.tobytes() for image in batch["image"])
        return shard_batch(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", watched)
    config = tiny(kind, drawn_root)
    (pretrain if kind == "pretrain" else finetune).run(config, tmp_path / "run")
    splits = {"train": set(), "validation": set(), "test": set()}
    with (drawn_root / "drawn" / "splits" / "default.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            data = (drawn_root / "pictures" / row["file"]).read_bytes()
            pixels = decode_image(data, config.data.image_size)
            splits[row["split"]].add(pixels.tobytes())
    assert all(len(images) >= 20 for images in splits.values())
    assert seen == splits["train"]


def test_pretraining_draws_its_curves_and_the_views_it_sees(pretrained):
    assert (pretrained / "curves.png").is_file()
    with Image.open(pretrained / "views.png") as sheet:
        assert sheet.size == (6 * (32 + 14) + 14, 6 * (32 + 14) + 14)  # 12 faces, 3 tiles each


def test_run_writes_what_reproduces_it(finetuned):
    info = json.loads((finetuned / "run.json").read_text())
    assert info["finished"] and info["step"] == 8 and info["data_fingerprint"]
    assert info["versions"]["jax"] == jax.__version__
    assert (finetuned / "curves.png").is_file()
    config = json.loads((finetuned / "config.json").read_text())
    assert config["model"]["name"] == "coatnet_atto"
    assert "drawn by this program" in (finetuned / "MODEL_CARD.md").read_text()


def test_run_from_before_other_losses_is_read_and_gone_on_with(drawn_root, finetuned, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(finetuned, old)
    config = json.loads((old / "config.json").read_text())
    assert (config["loss"].pop("decode"), config["loss"].pop("balanced")) == ("median", False)
    assert (config.pop("progressive"), config["data"].pop("label_noise")) == ([], "keep")
    assert config.pop("init_head") is False
    assert config.pop("distill") == {"teachers": "", "weight": 0.5}
    assert config["augment"].pop("rand_augment_ops") == 0
    assert config["augment"].pop("rand_augment_magnitude") == 9
    for key in ("blur_prob", "blur_sigma", "sharpen_prob", "sharpen"):
        config["augment"].pop(key)
    (old / "config.json").write_text(json.dumps(config))
    result = evaluate.run(old, drawn_root / "drawn")
    assert result == evaluate.run(finetuned, drawn_root / "drawn", out=tmp_path) | {"run": str(old)}
    init_from = config["init_from"]
    assert finetune.run(tiny("finetune", drawn_root, init_from=init_from), old)  # it is finished
    other = tiny("finetune", drawn_root, init_from=init_from, **{"loss.decode": "mean"})
    with pytest.raises(ValueError, match="loss.decode None there, 'mean' here"):
        finetune.run(other, old)


def test_other_head_decoder_and_balance_reach_every_result(drawn_root, tmp_path):
    loss = {"loss.name": "mse", "loss.decode": "mean", "loss.balanced": True}
    assert finetune.run(tiny("finetune", drawn_root, epochs=0.5, **loss), tmp_path / "run")
    log = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in log if "accuracy" in row]
    result = evaluate.run(
        tmp_path / "run", drawn_root / "drawn", split="validation", flip=False, batch_size=16
    )
    assert (result["decode"], result["loss"]) == ("mean", "mse")
    assert result["mae"] == pytest.approx(min(row["mae"] for row in validation), abs=1e-3)
    assert {row["attribute"] for row in result["attributes"]} == {"gender", "race"}
    assert all(0 <= row["macro_f1"] <= 1 for row in result["attributes"])


def test_every_stage_runs_on_faces_without_gender_and_race(drawn_root, tmp_path, capsys):
    for path in (drawn_root / "pictures").glob("*.jpg"):
        copy = tmp_path / "faces" / path.name.split("_")[0] / path.name[-25:]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    info = prepare(tmp_path / "faces", tmp_path, name="own", progress=None)
    assert (info["kept"], info["gender_known"], info["race_known"]) == (160, 0, 0)
    config, run = tiny("finetune", tmp_path, **{"data.name": "own"}), tmp_path / "run"
    assert finetune.run(config, run)
    result = evaluate.run(run, tmp_path / "own")
    assert result["images"] == 24 and "attributes" not in result
    embed.run(run, tmp_path / "own", max_points=24)
    with Image.open(run / "embed" / "tsne.png") as image:
        assert image.width < 1300  # two columns of the four
    pages = (run / "evaluate" / "test" / "report.md").read_text()
    pages += (run / "MODEL_CARD.md").read_text() + (run / "embed" / "embed.md").read_text()
    assert "UTKFace" not in pages and "gender" not in pages.replace("without_gender", "")


def test_fine_tuning_starts_from_the_pretrained_backbone(drawn_root, pretrained, tmp_path):
    config = tiny("finetune", drawn_root, init_from=str(pretrained))
    config.optim.train_from = "head"  # the backbone stays as it came
    finetune.run(config, tmp_path / "run")
    there, here = load_variables(pretrained)[0], load_variables(tmp_path / "run")[0]
    for kind in ("params", "batch_stats"):
        for a, b in zip(
            jax.tree.leaves(there[kind]["backbone"]),
            jax.tree.leaves(here[kind]["backbone"]),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_random_weights_have_no_early_layers_to_spare(drawn_root, pretrained, tmp_path, capsys):
    for decay, start, told in ((0.75, "", True), (0.75, pretrained, False), (1.0, "", False)):
        config = tiny("finetune", drawn_root, init_from=str(start))
        config.optim.layer_decay = decay
        finetune.open_finetuning(config, tmp_path / "new")
        assert ("these weights are random" in capsys.readouterr().out) == told


def test_fine_tuning_goes_on_with_the_head_where_it_is_asked_for(
    drawn_root, finetuned, tmp_path, monkeypatch
):
    started = []

    def train(state, *_, **__):
        started.append(state)
        return state, False

    monkeypatch.setattr(loop, "train", train)
    for head in (True, False):
        config = tiny("finetune", drawn_root, init_from=str(finetuned), init_head=head)
        (tmp_path / str(head) / FOLDER).mkdir(parents=True)  # as one killed in its first steps left
        finetune.run(config, tmp_path / str(head))
    told = json.loads((tmp_path / "True" / "run.json").read_text())
    assert [stage["stage"] for stage in told["before"]] == ["pretrain", "finetune"]
    kept, new = started
    there = load_variables(finetuned)[0]["params"]
    for tree in (kept.params, kept.ema_params, {**new.params, "head": there["head"]}):
        jax.tree.map(np.testing.assert_array_equal, tree, there)
    for name in ("hidden", "age"):
        assert not np.allclose(new.params["head"][name]["kernel"], there["head"][name]["kernel"])


def test_fine_tuning_learns_from_a_teacher_and_goes_on_with_that_one_alone(
    drawn_root, finetuned, tmp_path, monkeypatch
):
    def config(teacher=finetuned, weight=0.3):
        taught = {"distill.teachers": str(teacher), "distill.weight": weight}
        return tiny("finetune", drawn_root, **taught | {"epochs": 0.43})  # 3 steps

    step, given = finetune.finetune_train_step, []
    spied = lambda *args, **options: (given.append(options), step(*args, **options))[1]  # noqa: E731
    monkeypatch.setattr(finetune, "finetune_train_step", in_place_of(step, spied))
    run = tmp_path / "run"
    assert finetune.run(config(), run)
    told = json.loads((run / "run.json").read_text())
    assert told["step"] == len(given) == 3
    before = [(stage["stage"], stage["teacher"]) for stage in told["before"]]
    assert before == [("pretrain", "coatnet_atto"), ("finetune", "coatnet_atto")]
    assert told["before"][1]["fingerprint"] == told["data_fingerprint"]
    assert f"from random weights, taught by {finetuned}" in (run / "MODEL_CARD.md").read_text()
    # What the step was given answers as an evaluation of the teacher does, in every step.
    assert {options["teacher_weight"] for options in given} == {0.3}
    teachers, weights = (given[-1][key] for key in ("teachers", "teacher_variables"))
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    views = inference.eval_view(images, **inference.image_format(config()))
    evaluated = inference.load_run(finetuned, batch_size=16, sides=(1.0,))
    expected = evaluated.probabilities(images, flip=False)
    answer = jax.jit(teachers_answer, static_argnums=0)(teachers, weights, views)
    np.testing.assert_allclose(answer, expected, atol=1e-5)

    shutil.copytree(finetuned, tmp_path / "other")
    for changed, said in (
        (config(tmp_path / "other"), f"distill.teachers '{finetuned}' there, '{tmp_path}/other'"),
        (config(""), f"distill.teachers '{finetuned}' there, '' here"),
        (config(weight=0.4), "distill.weight 0.3 there, 0.4 here"),
    ):
        with pytest.raises(ValueError, match=said):
            finetune.run(changed, run)


def test_backbone_of_another_model_is_refused_with_both_sides(drawn_root, pretrained, tmp_path):
    config = tiny("finetune", drawn_root, init_from=str(pretrained))
    config.model.name = "coatnet_micro"
    with pytest.raises(ValueError, match=r"does not fit this model: .* there, .* here"):
        finetune.run(config, tmp_path / "run")


def test_other_config_in_the_same_workdir_is_refused(drawn_root, pretrained):
    config = tiny("pretrain", drawn_root)
    config.optim.lr = 0.123
    with pytest.raises(ValueError, match=r"optim.lr 0.001 there, 0.123 here"):
        pretrain.run(config, pretrained)


def test_training_does_not_go_on_with_other_faces(drawn_root, pretrained, finetuned, tmp_path):
    run, config = tmp_path / "run", tiny("finetune", drawn_root, init_from=str(pretrained))
    shutil.copytree(finetuned, run)
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(told | {"data_fingerprint": "0123456789abcdef0"}))
    with pytest.raises(ValueError, match="begun on data of fingerprint 0123456789abcdef, .* has"):
        finetune.run(config, run)


def test_training_does_not_go_on_with_other_labels(drawn_root, pretrained, finetuned, tmp_path):
    run, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finetuned, run)
    shutil.copytree(drawn_root / "drawn", root / "drawn")
    config = tiny("finetune", root, init_from=str(pretrained))
    table = root / "drawn" / "labels.csv"
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    rows[5]["age"] = str(int(rows[5]["age"]) + 1)
    with table.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match="run was begun on other ages, .* prepare the data as"):
        finetune.run(config, run)
    told = json.loads((run / "run.json").read_text())
    assert told.pop("label_digest") != open_split(root / "drawn", "train").label_digest
    (run / "run.json").write_text(json.dumps(told))  # of a run from before the digest
    finetune.run(config, run)


def test_training_does_not_go_on_with_other_validation_faces(drawn_root, finetuned, tmp_path):
    run, config = tmp_path / "run", read_config(finetuned / "config.json")
    shutil.copytree(finetuned, run)
    told = json.loads((run / "run.json").read_text())
    validation = len(open_split(drawn_root / "drawn", "validation"))
    assert told["validation_faces"] == validation
    (run / "run.json").write_text(json.dumps(told | {"validation_faces": validation - 2}))
    with pytest.raises(ValueError, match=f"{validation - 2} validation .* now there are"):
        finetune.run(config, run)


def test_checkpoints_of_an_unknown_training_are_not_gone_on_with(drawn_root, finetuned, tmp_path):
    shutil.copytree(finetuned / FOLDER, tmp_path / "run" / FOLDER)
    with pytest.raises(ValueError, match="holds checkpoints but no config.json"):
        finetune.run(tiny("finetune", drawn_root), tmp_path / "run")


def test_diverged_loss_stops_the_run(drawn_root, tmp_path):
    config = tiny("finetune", drawn_root)
    config.optim.lr, config.optim.clip_norm = 1e30, 0.0
    with pytest.raises(ValueError, match="the loss is not finite at step"):
        finetune.run(config, tmp_path / "run")


def call(capsys, *argv):
    """(exit status, stderr) of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code or 0, capsys.readouterr().err


BAD_VALUES = (
    *("batch_size=0", "log_every=0", "epochs=-1", "epochs=nan", "ema=2", "mixup=-1"),
    *("model.drop_path=1.5", "model.std=(0,0,0)", "optim.layer_decay=-1", "data.crop=foo"),
    *("augment.crop=0.5", "augment.crop=(1.0,0.5)", "optim.warmup_epochs=99"),
    *("augment.blur_sigma=(0.0,1.0)", "augment.sharpen=-1.0", "augment.erase_prob=1.2"),
    *("optim.lr=0", "optim.lr=nan", "optim.clip_norm=-1", "optim.weight_decay=-0.1"),
    *("loss.gender=-1", "loss.race=-1", "augment.jitter=-1", "max_minutes=-1"),
    *("monitor.patience=-1", "monitor.every_epochs=inf"),
    *("distill.weight=0", "distill.weight=1.5"),
    *("model.image_size=0", "model.image_size=-5", "data.image_size=0", "model.mean=(0.5,0.5)"),
    *("progressive=(32.5,48)", "progressive=(-1,48)"),
)


def test_batch_larger_than_the_training_split_is_told(drawn_root, tmp_path, capsys):
    config = tiny("finetune", drawn_root)
    config.batch_size = 128
    finetune.open_finetuning(config, tmp_path / "run")
    told = "a batch of 128 holds some of the 112 training images more than once"
    assert told in capsys.readouterr().out


def test_warm_up_that_rounds_to_the_whole_training_leaves_a_step():
    config = load_config("pretrain:atto,drawn")
    config.batch_size, config.epochs, config.optim.warmup_epochs = 64, 1.2, 1.1
    stage.check_values(config)
    schedule = stage.make_schedule(config, faces=112)
    warmup = stage.warmup_steps(config, schedule)
    assert (warmup, schedule.total_steps) == (1, 2)
    optim.warmup_cosine(1.0, total_steps=schedule.total_steps, warmup_steps=warmup)
    config.epochs, config.optim.warmup_epochs = 8, 1.0  # as ever where there is room
    assert stage.warmup_steps(config, stage.make_schedule(config, faces=112)) == 2


# What ended in a traceback, in "the loss is not finite", or trained on without a word.
@pytest.mark.parametrize(
    ("method", "bad"),
    [
        *(("byol", f"loss.momentum={value}") for value in (1.5, -0.1)),
        *(
            ("dino", f"loss.{name}_temperature={value}")
            for name in ("student", "teacher")
            for value in (0, -1)
        ),
        *(("dino", bad) for bad in ("loss.center_momentum=2", "loss.frozen_prototypes=2")),
        *(("dino", f"projection.{width}=0") for width in ("hidden", "bottleneck", "out")),
        ("byol", "prediction.hidden=0"),
        ("barlow_twins", "loss.redundancy=-1"),
        *(("vicreg", f"loss.{term}=-1") for term in ("invariance", "variance", "covariance")),
    ],
)
def test_impossible_values_of_a_method_are_refused_by_name(method, bad):
    config = load_config(f"pretrain:atto,drawn,{method}")
    stage.check_values(config)
    key, value = bad.split("=")
    part, name = key.split(".")
    config[part][name] = type(config[part][name])(float(value))
    with pytest.raises(ValueError, match=f"config.{key} is .*, it must be "):
        stage.check_values(config)


def test_a_word_where_a_tuple_holds_numbers_is_refused_by_name():
    words = ["--config.augment.crop=('half', 1.0)", "--workdir=x"]
    config, _ = parse_training_flags(words, default="finetune")
    with pytest.raises(ValueError, match=r"config.augment.crop is \('half', 1.0\), it must be two"):
        stage.check_values(config)


def test_command_line_errors_are_one_line(drawn_root, pretrained, finetuned, tmp_path, capsys):
    root = f"--config.data.root={drawn_root}"
    pre = ["pretrain", "--config=pretrain:atto,drawn", root, f"--workdir={tmp_path}/x"]
    fine = ["finetune", "--config=finetune:atto,drawn", root, f"--workdir={tmp_path}/x"]
    go_on = [*fine, "--config.init_head=True", f"--config.init_from={finetuned}"]
    broken = tmp_path / "broken"
    shutil.copytree(pretrained, broken)
    for file in (broken / "checkpoints").rglob("manifest.ocdbt"):
        file.write_bytes(b"nonsense")
    empty = tmp_path / "empty"
    empty.mkdir()
    a_file, released, damaged = (tmp_path / name for name in ("file", "released", "damaged"))
    a_file.touch()
    shutil.copytree(release_weights.PACKAGED, released)
    shutil.copytree(finetuned, damaged)
    (damaged / "config.json").write_text('{"stage": ')
    commands = [
        ["prepare", str(tmp_path / "missing.zip"), "--root", str(tmp_path)],
        ["prepare", str(empty), "--root", str(tmp_path)],
        [
            "pretrain",
            "--config=pretrain:atto",
            f"--config.data.root={empty}",
            f"--workdir={tmp_path}/x",
        ],
        ["pretrain", "--config=finetune:atto,drawn", root, f"--workdir={tmp_path}/x"],
        [*pre, "--config.model.name=coatnet_9"],
        [*pre, "--config.optim.name=adam"],
        [*pre, "--config.monitor.images=4"],
        [*fine, "--config.loss.name=kl"],
        [*fine, "--config.loss.decode=mode"],
        [*fine, "--config.init_from=nowhere"],
        [*fine, f"--config.init_from={broken}"],
        [*fine, "--config.init_head=True"],
        [*fine, "--config.init_head=True", f"--config.init_from={pretrained}"],
        [*go_on, "--config.loss.name=sord"],
        [*go_on, "--config.model.name=coatnet_micro"],
        [*fine, "--config.optim.train_from=stage9"],
        [*fine, "--config.progressive=(64,48)"],
        [
            *fine,
            "--config.augment.rand_augment_ops=2",
            "--config.augment.rand_augment_magnitude=12",
        ],
        [*fine, "--config.data.label_noise=remove"],
        ["evaluate", str(pretrained)],
        ["evaluate", str(finetuned), "--decode", "mode"],
        ["evaluate", str(empty)],
        ["embed", str(pretrained), "--split", "holdout"],
        ["embed", str(pretrained), "--split", "validation+train"],
        ["evaluate", str(finetuned), "--out", str(a_file)],
        ["evaluate", str(damaged)],
        ["finetune", "--config=finetune:atto,drawn", root, f"--workdir={a_file}/x"],
        ["finetune", "--config=finetune:atto,drawn", root, f"--workdir={released}"],
        *([*fine, f"--config.{bad}"] for bad in BAD_VALUES),
        ["predict", str(pretrained), str(tmp_path / "missing.jpg")],
    ]
    for command in commands:
        status, message = call(capsys, *command)
        assert status == 1, command
        lines = message.strip().splitlines()
        assert lines[-1].startswith("coatnet-jax: error: "), (command, message)
        assert not any("Traceback" in line for line in lines), (command, message)


def test_run_that_cannot_teach_is_refused_in_one_line(
    drawn_root, pretrained, finetuned, tmp_path, capsys
):
    gray = json.loads((finetuned / "config.json").read_text())
    gray["model"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "gray").mkdir()
    (tmp_path / "gray" / "config.json").write_text(json.dumps(gray))
    shutil.copytree(tmp_path / "gray", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_bytes((finetuned / "config.json").read_bytes())
    command = ["finetune", "--config=finetune:atto,drawn,tiny", f"--workdir={tmp_path}/x"]
    command += [f"--config.data.root={drawn_root}", "--config.batch_size=16"]
    for teachers, options, said in (
        (tmp_path / "gone", (), f"{tmp_path}/gone/config.json is missing"),
        (tmp_path / "empty", (), f"no checkpoint in {tmp_path}/empty"),
        (f"{finetuned}, {pretrained}", (), f"{pretrained} is of stage pretrain"),
        (finetuned, ("model.image_size=48",), "(model.image_size 32 there, 48 here)"),
        (tmp_path / "gray", (), "(model.mean (0.5, 0.5, 0.5) there, (0.4"),
        # What counts is how the student's views are normalised in the end.
        (finetuned, (from_gray := f"init_from={tmp_path}/gray",), "there, (0.5, 0.5, 0.5) here)"),
        (tmp_path / "gray", (from_gray,), f"no checkpoint in {tmp_path}/gray"),
        (finetuned, ("progressive=(16,32)",), "config.progressive must be empty"),
    ):
        options = ["model.image_size=32", *options, f"distill.teachers={teachers}"]
        status, message = call(capsys, *command, *(f"--config.{option}" for option in options))
        (line,) = message.strip().splitlines()
        assert status == 1 and line.startswith("coatnet-jax: error: ") and said in line, message
    assert not (tmp_path / "x").exists()


def exhaust_memory(*_, **__):
    """What no device can hold: the error is JAX's own."""
    return jax.numpy.zeros(1 << 50).block_until_ready()


def small_run(stage, root, run):
    """The command of what `tiny` configures: eight steps, saved after three of them."""
    command = [stage, f"--config={stage}:atto,drawn,tiny", f"--config.data.root={root}"]
    command += [f"--workdir={run}", "--config.model.image_size=32", "--config.batch_size=16"]
    command += ["--config.epochs=1.2", "--config.monitor.every_epochs=0.43"]
    small = (f"--config.projection.{value}" for value in ("layers=2", "hidden=16", "out=8"))
    return [*command, *small] if stage == "pretrain" else command


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_without_enough_memory_says_how_it_takes_less(
    stage, drawn_root, tmp_path, monkeypatch, capsys
):
    module = {"pretrain": pretrain, "finetune": finetune}[stage]
    name = f"{stage}_train_step"
    monkeypatch.setattr(module, name, in_place_of(getattr(module, name), exhaust_memory))
    views = tmp_path / "run" / "views.png"  # left by another config that did not come far
    views.parent.mkdir()
    views.touch()
    status, message = call(capsys, *small_run(stage, drawn_root, tmp_path / "run"))
    assert (views.stat().st_size > 0) == (stage == "pretrain")
    (line,) = message.strip().splitlines()
    assert status == 1 and line.startswith("coatnet-jax: error: the memory of the device (cpu) ran")
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 4503599627370496 bytes" in line
    first = "give --config.model.remat=True (the same result, in more time)"
    assert f": {first} or lower --config.batch_size (16 now)" in line
    parts = " or give --config.accumulate=2 (images are then compared within a part of the batch "
    assert (parts in line) == (stage == "pretrain")


def test_training_that_ran_out_of_memory_goes_on(drawn_root, tmp_path, monkeypatch, capsys):
    command = small_run("finetune", drawn_root, tmp_path / "run")

    def exhausted_after(count, *words):
        name, working = "finetune_train_step", finetune.finetune_train_step
        steps = [working] * count
        with monkeypatch.context() as patched:
            step = lambda *a, **b: (steps.pop() if steps else exhaust_memory)(*a, **b)  # noqa: E731
            patched.setattr(finetune, name, in_place_of(working, step))
            return call(capsys, *command, *words)

    assert "(32 now)" in exhausted_after(0, "--config.batch_size=32")[1]
    # Nothing was saved, so the folder can have a smaller batch. With a checkpoint it cannot.
    status, message = exhausted_after(4)
    kept = f"in a new --workdir; the last checkpoint in {tmp_path}/run is kept, and the same comm"
    assert status == 1 and "(16 now)" in message and kept in message
    status, message = call(capsys, *command, "--config.batch_size=8")
    assert status == 1 and "batch_size 16 there, 8 here" in message
    assert call(capsys, *command) == (0, "")
    log = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 6, 6, 8, 8]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 8


def test_command_without_enough_memory_says_where_there_is_more(
    finetuned, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(evaluate, "run", exhaust_memory)
    for backend, mend in (("cpu", "end other programs that"), ("gpu", "JAX_PLATFORMS=cpu before")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        status, message = call(capsys, "evaluate", str(finetuned))
        (line,) = message.strip().splitlines()
        assert status == 1 and "the memory of the device (cpu) ran out (RESOURCE" in line
        assert mend in line
    monkeypatch.setenv("COATNET_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="ran out") as error:
        main(["evaluate", str(finetuned)])
    assert isinstance(error.value.__cause__, jax.errors.JaxRuntimeError)


def test_own_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("coatnet_jax.main._run", lambda argv: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["demo"])
