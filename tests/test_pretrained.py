"""timm's weights brought in as a run: what is written, and a fine-tuning that starts from it."""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make_timm_fixtures as made
import numpy as np
import pytest
from safetensors.numpy import save, save_file
from test_weight_files import write_torch

from coatnet_jax import coatnet_rw, finetune, inference, pretrained, sharding, stage
from coatnet_jax.config import load_config, parse_training_flags, read_config
from coatnet_jax.import_timm import expected_weights, import_timm
from coatnet_jax.inference import build_model, load_run
from coatnet_jax.main import main
from coatnet_jax.weight_files import read_weights

NAME = "coatnet_nano_rw"
HALVES = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(compiled_once):
    """A small `coatnet_nano_rw` on one device."""
    with pytest.MonkeyPatch.context() as patch:
        small = coatnet_rw.RWConfig((8, 8, 32, 32, 32), (1, 1, 1, 1, 1), stem_width=8)
        patch.setitem(coatnet_rw.RW_VARIANTS, NAME, small)
        for user in (stage, inference):
            patch.setattr(user, "make_mesh", partial(sharding.make_mesh, 1))
        yield


@pytest.fixture(scope="module")
def state(quick_compiles):
    weights = expected_weights(NAME, image_size=64, classes=10)
    return made.state_dict({weight.name: weight.shape for weight in weights})


@pytest.fixture(scope="module")
def imported(state, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("weights"), io.StringIO()
    source, workdir = folder / f"{NAME}_224_sw-f5309.pth", folder / "a run"
    write_torch(source, state)
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(said):
        main(["import-timm", str(source), f"--workdir={workdir}"])
    assert not stop.value.code
    advice = shlex.split(said.getvalue().partition("start from it with ")[2])
    assert parse_training_flags([*advice, "--workdir=w"], default="")[0].init_from == str(workdir)
    return workdir


def test_imported_run_holds_the_weights_and_what_images_are_like(state, imported):
    run = load_run(imported)
    jax.tree.map(np.testing.assert_array_equal, run.variables, import_timm(state, NAME))
    config = json.loads((imported / "config.json").read_text())
    assert config["stage"] == "timm" and config["model"] == {
        "name": NAME, "image_size": 64, "mean": HALVES, "std": HALVES, "drop_path": 0.0,
        "dtype": "float32", "classes": 10,
    }  # fmt: skip
    assert len(config["timm"]["sha256"]) == 64 and config["timm"]["name"].endswith("f5309.pth")


def test_features_see_images_normalised_as_the_config_says(imported):
    run = load_run(imported, batch_size=2)
    faces = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    model = build_model(run.config)
    views = jnp.asarray(faces / 127.5 - 1, jnp.float32)
    expected = jax.jit(partial(model.apply, train=False))(run.variables, views)["features"]
    np.testing.assert_allclose(run.features(faces), expected, rtol=1e-3, atol=1e-4)


def test_finetuning_starts_from_it_at_another_size_with_its_mean(
    imported, drawn_root, tmp_path, capsys
):
    config = load_config(f"finetune:{NAME},drawn,tiny")
    config.data.root, config.init_from = str(drawn_root), str(imported)
    config.model.image_size, config.batch_size, config.epochs = 32, 16, 0.3
    config.optim.train_from = "head"  # the backbone stays as it came
    again = config.copy_and_resolve_references()
    assert finetune.run(config, tmp_path / "run")
    assert f"as for {imported}: mean (0.5, 0.5, 0.5)" in capsys.readouterr().out
    saved = read_config(tmp_path / "run" / "config.json")
    assert saved.model.mean == saved.model.std == (0.5, 0.5, 0.5)
    assert finetune.run(again, tmp_path / "run")  # the same command, and the run is at its end
    there, here = load_run(imported).variables, load_run(tmp_path / "run").variables
    for kind in ("params", "batch_stats"):
        kept, tuned = there[kind]["backbone"], here[kind]["backbone"]
        jax.tree.map(np.testing.assert_array_equal, kept["stage2_block0"], tuned["stage2_block0"])
    tables = [v["params"]["backbone"]["stage3_block0"]["attention"] for v in (there, here)]
    assert [table["relative_bias"].shape for table in tables] == [(49, 1), (9, 1)]


def test_timms_description_beside_the_weights_is_read(state, tmp_path):
    about = {
        "architecture": f"{NAME}_224",
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic",
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(state, tmp_path / "model.safetensors")
    pretrained.run(str(tmp_path), tmp_path / "run")
    config = read_config(tmp_path / "run" / "config.json")
    assert config.model.mean == (0.1, 0.2, 0.3) and config.model.std == (0.4, 0.5, 0.6)
    assert config.timm.interpolation == "bicubic" and config.timm.name == f"{NAME}_224"


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"mean": 0.5}, "says mean 0.5, three numbers are wanted"),
        ({"std": [0.5, "x", 1]}, r"says std \[0.5, 'x', 1\], three"),
        ({"input_size": [3, 64]}, r"says input_size \[3, 64\], three"),
        ({"architecture": 7, "mean": 0.5}, None),  # not timm's: as if it were not there
        ({"pretrained_cfg": None, "mean": 0.5}, None),
    ],
)
def test_description_that_cannot_be_meant_is_refused_or_none(about, reason, state, tmp_path):
    about = {"architecture": f"{NAME}_224", **about}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(state, tmp_path / f"{NAME}_224.safetensors")
    source = str(tmp_path / f"{NAME}_224.safetensors")
    if reason:
        with pytest.raises(ValueError, match=reason):
            pretrained.run(source, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    else:
        pretrained.run(source, tmp_path / "run")


@pytest.mark.parametrize(
    "timm_name, ours",
    [
        ("coatnet_0_224", "coatnet_0"),
        ("coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k", "coatnet_rmlp_1_rw2"),
        ("coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k", "coatnet_rmlp_2_rw"),
        ("coatnet_bn_0_rw_224_sw-c228e218.pth", "coatnet_bn_0_rw"),
        ("coatnet_2_rw.safetensors", "coatnet_2_rw"),
    ],
)
def test_names_of_timm_and_of_its_files_are_understood(timm_name, ours):
    assert pretrained.model_name(timm_name) == ours


def test_a_name_is_fetched_from_the_hub(state, tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repository, file):
        asked.append((repository, file))
        path = tmp_path / file
        if file.endswith("json"):
            path.write_text(json.dumps({"architecture": f"{NAME}_224"}))
        else:
            save_file(state, path)
        return str(path)

    hub = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    pretrained.run(NAME, tmp_path / "run")
    repository = f"timm/{NAME}_224.sw_in1k"
    assert asked == [(repository, "config.json"), (repository, "model.safetensors")]
    assert load_run(tmp_path / "run").config.timm.name == f"{NAME}_224"

    def unreachable(*_):
        raise OSError("no route\nto host")

    hub.hf_hub_download = unreachable
    with pytest.raises(ValueError, match=r"fetched \(no route\); download https://hugging"):
        pretrained.download(f"timm/{NAME}_224")


FETCH = "import sys; from coatnet_jax.pretrained import download; print(download(sys.argv[1]))"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download asks for; `files` are by address."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        body = self.files.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        if body:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path, b""))

    def log_message(self, *_):
        pass


def test_the_hub_package_fetches_weights_over_http(state, tmp_path):
    pytest.importorskip("huggingface_hub")
    at = f"/timm/{NAME}_224.sw_in1k/resolve/main/"
    about = json.dumps({"architecture": f"{NAME}_224"}).encode()
    Hub.files = {at + "config.json": about, at + "model.safetensors": save(state)}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The package reads its address when it is imported: a process of its own.
        done = subprocess.run(
            [sys.executable, "-c", FETCH, NAME],
            env={
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert (path.parent / "config.json").read_bytes() == about
    jax.tree.map(np.testing.assert_array_equal, read_weights(path), state)


def test_bad_input_is_one_line(state, imported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    good = tmp_path / f"{NAME}.safetensors"
    save_file(state, good)
    save_file({**state, "head.fc.bias": np.ones(3)}, tmp_path / f"{NAME}_224.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / f"{NAME}_224.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    table = "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    rectangle = {**state, table: np.ones((35, 1), np.float32)}
    save_file(rectangle, tmp_path / f"{NAME}_320.safetensors")
    new, theirs = tmp_path / "new", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"architecture": "coatnet_nano_rw_224"}')
    for source, options, said in (
        ("coatnet_nano_rv_224", [], "near: coatnet_nano_rw_224.sw_in1k"),
        (NAME, [], "install huggingface-hub"),
        (tmp_path / "nothing.pth", [], "there is no file"),
        (tmp_path / "model.safetensors", [], "which with --model"),
        (good, ["--model=coatnet_9"], "near: coatnet_4"),
        (
            good,
            ["--model=coatnet_rmlp_nano_rw"],
            r"\(10, 32\) there, \(10, 512\) in.*; .* and \d+ more$",
        ),
        (tmp_path / f"{NAME}_224.safetensors", [], r"head.fc.bias: \(3,\) there, \(10,\) in"),
        (tmp_path / f"{NAME}_320.safetensors", [], "35 relative positions .* square"),
        (tmp_path / f"{NAME}_224.pth", [], "before version 1.6"),
        (good, [f"--workdir={imported}"], "holds a run already"),
        (good, [f"--workdir={theirs}"], "config.json of something else, .* a new --workdir"),
        (tmp_path, ["--model=coatnet_0"], "not the weights of timm's"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["import-timm", str(source), f"--workdir={new}", *options])
        message = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 1 and len(message) == 1, (source, message)
        assert message[0].startswith("coatnet-jax: error: ")
        assert re.search(said, message[0]), (said, message[0])
    assert not new.exists()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(imported)])
    assert stop.value.code == 1 and "without an age head" in capsys.readouterr().err
