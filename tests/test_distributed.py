"""Two processes on this machine train what one does; how processes are named."""

import json
import os
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from coatnet_jax import distributed, finetune, inference, pretrain, sharding, stage
from coatnet_jax.checkpoint import load_variables
from coatnet_jax.config import parse_training_flags


@pytest.mark.parametrize(
    "spec", ["10.0.0.1,2,0", "host:1,2", "host:1,2,2", "host:1,two,0", "host:1,2,0,0"]
)
def test_misspelled_processes_are_refused(spec):
    with pytest.raises(ValueError, match="HOST:PORT,PROCESSES,INDEX with an index from 0"):
        distributed.start(spec)


def test_missing_cluster_is_told_in_one_line(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="auto could not be started .coordinator") as error:
        distributed.start("auto")
    assert "\n" not in str(error.value)


def test_spec_names_coordinator_processes_and_index(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the cache stays as it is
    distributed.start("")
    assert not given
    distributed.start("10.0.0.1:1234,4,3")
    assert given == {
        "coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3,
    }  # fmt: skip


SMALL = {
    "pretrain": ["--config.projection.hidden=16", "--config.projection.out=8"],
    "finetune": ["--config.ema=0.9"],
}


def flags(kind, root, workdir, **changes):
    values = {
        "data.root": root,
        "batch_size": 16,
        "epochs": 0.72,  # 5 steps of 7 an epoch
        "monitor.every_epochs": 0.29,  # every 2 steps
        "model.image_size": 32,
        "log_every": 3,
        **changes,
    }
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={kind}:simple_cnn,drawn,tiny", f"--workdir={workdir}", *given, *SMALL[kind]]


def run_processes(kind, arguments, count=2):
    """(exit status, what was printed) of each of `count` processes with one CPU device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one_device = " --xla_force_host_platform_device_count=1"
    meet_late = " --xla_cpu_collective_timeout_seconds=600"  # as they do on a busy machine
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + one_device + meet_late}
    command = [sys.executable, "-m", "coatnet_jax", kind, *arguments]
    running = [
        subprocess.Popen(
            [*command, f"--config.distributed=127.0.0.1:{port},{count},{index}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        printed = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], printed


@pytest.fixture(scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        for user in (stage, inference):
            patch.setattr(user, "make_mesh", partial(sharding.make_mesh, 1))
        yield


@pytest.fixture(scope="module")
def pretrained(drawn_root, tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("runs") / "pretrain"
    config, _ = parse_training_flags(flags("pretrain", drawn_root, workdir), default="pretrain")
    assert pretrain.run(config, workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_two_processes_train_what_one_does(kind, drawn_root, pretrained, tmp_path):
    """The two are stopped after 3 steps, so that one process goes on with what they saved."""
    run = {"pretrain": pretrain, "finetune": finetune}[kind].run
    start = {"init_from": pretrained} if kind == "finetune" else {}
    one, two = pretrained, tmp_path / "two"
    if kind == "finetune":
        config, one = parse_training_flags(
            flags(kind, drawn_root, tmp_path / "one", **start), default=kind
        )
        assert run(config, one)
    stopped = flags(kind, drawn_root, two, max_minutes=1e-6, **start)
    statuses, printed = run_processes(kind, stopped)
    assert statuses == [3, 3], printed
    assert "on 2 cpu device(s) of 2 processes" in printed[0]
    assert f"[{kind}]" not in printed[1]
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert load_variables(two, which="latest")[1] == 3
    config, two = parse_training_flags(flags(kind, drawn_root, two, **start), default=kind)
    assert run(config, two)
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5]
    for a, b in zip(*rows, strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-5)
    same_weights(one, two)


def same_weights(one, two):
    a, b = (load_variables(path, which="latest")[0] for path in (one, two))
    for kind in ("params", "batch_stats"):
        for x, y in zip(jax.tree.leaves(a[kind]), jax.tree.leaves(b[kind]), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
