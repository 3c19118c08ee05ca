"""The demo: its stages in order, each from the one before, also on sets too small for a t-SNE."""

import pytest

from coatnet_jax import demo, embed


@pytest.mark.parametrize("faces", [embed.SMALLEST - 1, embed.SMALLEST])
def test_stages_follow_each_other_and_too_few_faces_leave_out_the_tsne(
    faces, tmp_path, monkeypatch, capsys
):
    done, given = [], {}

    def stage(name, result=True):
        def run(*arguments, **options):
            done.append((name, arguments[0]))
            given[name] = (arguments[1:], options)
            return result

        return run

    for name in ("pretrain", "embed", "finetune", "evaluate", "predict"):
        monkeypatch.setattr(getattr(demo, name), "run", stage(name))
    monkeypatch.setattr(demo.report, "run_report", stage("report", tmp_path / "report.html"))
    monkeypatch.setattr(demo, "prepare", stage("prepare", {"name": "few"}))
    monkeypatch.setattr(demo, "open_split", lambda *_: range(faces))
    samples = {tmp_path / "a.jpg": 6}
    monkeypatch.setattr(demo, "_write_samples", lambda *_: samples)
    page = demo.run(["faces.zip"], tmp_path, root=str(tmp_path), tiny=True)
    assert page == tmp_path / "report.html"
    assert [name for name, _ in done] == [
        *("prepare", "pretrain"),
        *(["embed"] if faces >= embed.SMALLEST else []),
        *("finetune", "evaluate", "predict", "report"),
    ]
    assert given["predict"][0] == ([tmp_path / "a.jpg"],)
    assert given["predict"][1]["true_ages"] == samples
    configs = {name: config for name, config in done if name in ("pretrain", "finetune")}
    assert configs["finetune"].init_from == str(tmp_path / "pretrain")
    assert {config.data.name for config in configs.values()} == {"few"}
    told = f"{faces} validation faces are too few" in capsys.readouterr().out
    assert told == (faces < embed.SMALLEST)


def test_samples_are_test_faces_from_young_to_old_with_their_true_ages(tmp_path, monkeypatch):
    ages = [70, 3, 41, 18]

    class Faces:
        labels = {"age": ages}

        def __len__(self):
            return len(ages)

        def __getitem__(self, row):
            return {"image": b"%d years" % ages[row]}

    monkeypatch.setattr(demo, "open_split", lambda folder, split: Faces())
    (tmp_path / "left_by_an_earlier_run.jpg").touch()
    samples = demo._write_samples(tmp_path, tmp_path)
    assert list(samples.values()) == [3, 18, 41, 70]
    assert {path.read_bytes(): age for path, age in samples.items()} == {
        b"%d years" % age: age for age in ages
    }
    assert sorted(tmp_path.iterdir()) == list(samples)
