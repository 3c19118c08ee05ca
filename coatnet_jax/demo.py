"""The whole path in one command, from pictures to a report."""

import time
from pathlib import Path

from coatnet_jax import embed, evaluate, finetune, predict, pretrain, report
from coatnet_jax.config import load_config
from coatnet_jax.paths import data_folder, home
from input_pipeline.pipeline import open_split
from input_pipeline.prepare import prepare
from input_pipeline.progress import duration
from input_pipeline.synthetic_faces import write_drawn_faces

DRAWN, TINY_DRAWN = 3000, 400  # faces


def run(data: list[str] | None, workdir: Path, *, root: str = "", tiny: bool = False) -> Path:
    """Path of the HTML report, after running every stage into `workdir` (finished ones are kept).

    `data` is an archive or folder of faces (UTKFace, or another layout that is recognised); None
    draws faces. Raises as the stages do.
    """
    started = time.monotonic()
    name = "" if data else "drawn-tiny" if tiny else "drawn"  # '': that of the layout
    words = ("micro,cpu" if data else "atto,drawn") + (",tiny" if tiny else "")
    if data is None:
        count = TINY_DRAWN if tiny else DRAWN
        _say(f"1/7 drawing {count} faces (drawn faces are for trying the software)")
        source = (Path(root) if root else home()) / "drawn-pictures" / str(count)
        data = [str(write_drawn_faces(source, count=count, progress=print))]
    _say("2/7 preparing the data")
    name = prepare(data, data_folder("", root), name=name)["name"]
    folder = data_folder(name, root)

    _say("3/7 pre-training (SimCLR)")
    config = _config(f"pretrain:{words}", name, root)
    _finish(pretrain.run(config, workdir / "pretrain"))
    if (faces := len(open_split(folder, "validation"))) < embed.SMALLEST:
        _say(f"4/7 left out: {faces} validation faces are too few for a t-SNE")
    else:
        _say("4/7 looking at the latent space (t-SNE)")
        embed.run(workdir / "pretrain", folder, max_points=200 if tiny else 2000)
    _say("5/7 fine-tuning for age")
    config = _config(f"finetune:{words}", name, root)
    config.init_from = str(workdir / "pretrain")
    _finish(finetune.run(config, workdir / "finetune"))
    _say("6/7 evaluating on the test split")
    evaluate.run(workdir / "finetune", folder)
    _say("7/7 ages for single pictures")
    samples = _write_samples(folder, workdir / "samples")
    out = workdir / "predictions"
    predict.run(workdir / "finetune", list(samples), out=out, true_ages=samples)
    page = report.run_report(workdir)
    _say(f"done in {duration(time.monotonic() - started)}: open {page}")
    return page


def _config(spec: str, name: str, root: str):
    config = load_config(spec)
    config.data.name, config.data.root = name, root
    return config


def _finish(finished: bool) -> None:
    if not finished:
        raise KeyboardInterrupt


def _write_samples(folder: Path, out: Path, count: int = 12) -> dict[Path, int]:
    """A few test pictures as files, from young to old, to predict as one's own photos: {file: its
    true age}, which its name says too."""
    faces = open_split(folder, "test")
    order = sorted(range(len(faces)), key=lambda i: int(faces.labels["age"][i]))
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jpg"):
        old.unlink()
    written = {}
    count = min(count, len(faces))
    for k in range(count):
        row = order[k * (len(faces) - 1) // max(1, count - 1)]
        age = int(faces.labels["age"][row])
        path = out / f"true_age_{age:03d}_{k:02d}.jpg"
        path.write_bytes(faces[row]["image"])
        written[path] = age
    return written


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)
