"""The demo: its stages in order, each from the one before, also on sets too small for a t-SNE."""

import pytest

from coatnet_jax import demo, embed


@pytest.mark.parametrize("faces", [embed.SMALLEST - 1, embed.SMALLEST])
def test_stages_follow_each_other_and_too_few_faces_leave_out_the_tsne(
    faces, tmp_path, monkeypatch, capsys
):
    done = []

    def stage(name, result=True):
        def run(*arguments, **_):
            done.append((name, arguments[0]))
            return result

        return run

    for name in ("pretrain", "embed", "finetune", "evaluate", "predict"):
        monkeypatch.setattr(getattr(demo, name), "run", stage(name))
    monkeypatch.setattr(demo.report, "run_report", stage("report", tmp_path / "report.html"))
    monkeypatch.setattr(demo, "prepare", stage("prepare", {"name": "few"}))
    monkeypatch.setattr(demo, "open_split", lambda *_: range(faces))
    monkeypatch.setattr(demo, "_write_samples", lambda _, out: out)
    page = demo.run(["faces.zip"], tmp_path, root=str(tmp_path), tiny=True)
    assert page == tmp_path / "report.html"
    assert [name for name, _ in done] == [
        *("prepare", "pretrain"),
        *(["embed"] if faces >= embed.SMALLEST else []),
        *("finetune", "evaluate", "predict", "report"),
    ]
    configs = {name: config for name, config in done if name in ("pretrain", "finetune")}
    assert configs["finetune"].init_from == str(tmp_path / "pretrain")
    assert {config.data.name for config in configs.values()} == {"few"}
    told = f"{faces} validation faces are too few" in capsys.readouterr().out
    assert told == (faces < embed.SMALLEST)
