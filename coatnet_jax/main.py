"""The command line: the commands of `coatnet-jax`, each in a module of its own."""

import argparse
import atexit
import gc
import importlib.metadata
import io
import os
import sys
import traceback
from pathlib import Path

from coatnet_jax.full_disk import full_disk_explained

TRAINING = {
    "pretrain": "self-supervised pre-training (SimCLR unless another method is named): "
    "--config=pretrain:micro --workdir=FOLDER",
    "finetune": "fine-tuning for age: --config=finetune:micro --config.init_from=RUN --workdir=…",
}
UNFINISHED = 3  # exit status of a training that was stopped and saved; the same command resumes


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 wrong input or too little memory (one line says which),
    3 stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A character that the terminal lacks, or a name of other bytes, is '?' and ends no command.
        sys.stdout.reconfigure(errors="replace")
    try:
        with full_disk_explained(argv):
            sys.exit(_run(argv))
    except KeyboardInterrupt:
        print("coatnet-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        path = getattr(error, "filename", None)  # of what the system refused to open
        if os.environ.get("COATNET_JAX_TRACEBACK") or not (path or _is_ours(error)):
            raise
        refused = f"{path} cannot be used ({getattr(error, 'strerror', '')}): give another path"
        print(f"coatnet-jax: error: {refused if path else error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, as a message to the user, and not what it called."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(__file__).resolve().parent.parent
    packages = [ours / "coatnet_jax", ours / "input_pipeline", ours / "configs"]
    return any(Path(frame.filename).resolve().is_relative_to(p) for p in packages)


def _run(argv: list[str]) -> int:
    command = argv[0] if argv else ""
    if command == "--version":
        print(f"coatnet-jax {importlib.metadata.version('coatnet-jax')}")
        return 0
    wants_help = any(arg in ("-h", "--help", "--helpfull") for arg in argv)
    if command in TRAINING:
        return (_training_help if wants_help else _train)(command, argv[1:])
    if command == "tune" and not wants_help:
        return _tune(argv[1:])
    arguments = _parser().parse_args([_at_home(word) for word in argv])
    for written in ("out", "workdir"):
        if path := getattr(arguments, written, None):
            check_writable(Path(path), flag=f"--{written}")
    _prepare_process()
    from coatnet_jax.device_memory import exhaustion_explained, more_memory

    with exhaustion_explained(more_memory):
        return arguments.run(arguments) or 0


def _at_home(word: str) -> str:
    """A word of the command line with its ~ replaced: a shell leaves that of --out=~/ages."""
    flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(path)


def check_writable(folder: Path, *, flag: str) -> None:
    """Raise ValueError where `folder` cannot be written into: before the work, not after it."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, so {folder} cannot be a folder: give another {flag}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written to: give another {flag}")


def _prepare_process() -> None:
    """Settings of the process, before jax is imported and makes its first array."""
    from absl import flags

    from coatnet_jax.paths import home
    from coatnet_jax.runtime import set_up

    set_up()
    # JAX's hundreds of thousands of objects stay to the end: Python would look through them for
    # garbage again and again while they come and once more at exit, a third of the import's time.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl's flags
    # What was compiled once is read back the next time: a resumed run starts in seconds.
    # But XLA crashes where it writes down what it compiled for several CPU devices.
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home() / "compiled"))
        # By default only what took a second is kept: too long for the one photo of `predict`.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _training_help(command: str, argv: list[str]) -> int:
    """Print the flags of a training, and the words and keys of the config that is named."""
    from coatnet_jax.config import describe_config, join_values, named_config

    parser = argparse.ArgumentParser(
        prog=f"coatnet-jax {command}", description=TRAINING[command], allow_abbrev=False
    )
    _add_training_arguments(parser, command)
    config = named_config(join_values(argv), default=command)
    print(f"{parser.format_help()}\n{describe_config(config)}")
    return 0


def _add_training_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    add = parser.add_argument
    add(
        "--config",
        metavar="NAME:WORDS",
        help=f"a shipped config with its words ({stage}:micro), or a path (default: {stage})",
    )
    add("--config.KEY", metavar="VALUE", help="set a value of the config (may be repeated)")
    add("--workdir", required=True, help="folder for checkpoints and results (required)")


def _train(command: str, argv: list[str]) -> int:
    from coatnet_jax.config import parse_training_flags

    config, workdir = parse_training_flags(argv, default=command)
    check_writable(workdir, flag="--workdir")
    if config.get("stage") != command:
        raise ValueError(
            f"coatnet-jax {command} was given a config of the stage {config.get('stage')!r}; "
            f"give one like --config={command}:micro"
        )
    _prepare_process()
    from coatnet_jax.device_memory import exhaustion_explained, less_memory
    from coatnet_jax.distributed import start

    start(config.get("distributed", ""))
    if command == "pretrain":
        from coatnet_jax.pretrain import run
    else:
        from coatnet_jax.finetune import run
    with exhaustion_explained(lambda: less_memory(config, workdir)):
        return 0 if run(config, workdir) else UNFINISHED


def _tune(argv: list[str]) -> int:
    """`tune`: flags of its own, and all of `finetune`'s."""
    from coatnet_jax.config import parse_training_flags

    parser = argparse.ArgumentParser(prog="coatnet-jax tune", allow_abbrev=False)
    _add_tune_arguments(parser)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.search is not None:
        for name in ("lrs", "weight_decays", "overfit_faces", "overfit_steps"):
            if getattr(arguments, name) != parser.get_default(name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is no flag of --search: leave out one of the two")
    config, workdir = parse_training_flags(rest, default="finetune")
    check_writable(workdir, flag="--workdir")
    if config.get("stage") != "finetune":
        raise ValueError(f"coatnet-jax tune is for fine-tuning, not for {config.get('stage')!r}")
    if config.get("distributed"):
        raise ValueError("coatnet-jax tune is one process: leave out --config.distributed")
    _prepare_process()
    from coatnet_jax import tune, tune_search
    from coatnet_jax.device_memory import exhaustion_explained, less_memory

    flags = tune.config_flags(rest)
    # Its runs share one config, so with another it takes another folder from the first run on.
    with exhaustion_explained(lambda: less_memory(config, workdir, other_folder=True)):
        if arguments.search is not None:
            trials, steps = arguments.search, arguments.steps
            done = tune_search.run(config, workdir, trials=trials, steps=steps, flags=flags)
        else:
            done = tune.run(config, workdir, plan=tune.make_plan(config, arguments), flags=flags)
    return 0 if done else UNFINISHED


def _add_tune_arguments(tune: argparse.ArgumentParser) -> None:
    add = tune.add_argument
    add("--steps", type=int, default=100, help="steps of a short run (default: 100)")
    add("--lrs", metavar="A,B,…", help="learning rates (default: seven around the config's)")
    add(
        "--weight-decays", metavar="A,B,…", help="weight decays (default: four around the config's)"
    )
    add("--overfit-faces", type=int, default=64, help="faces to learn by heart (default: 64)")
    add("--overfit-steps", type=int, default=300, help="steps to do so (default: 300)")
    add(
        "--search",
        type=int,
        metavar="N",
        help="instead, without the grids and the faces to learn by heart: N trials of an Optuna "
        "search, --steps each (needs pip install '.[tune]')",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coatnet-jax",
        description="Age estimation from face photos: CoAtNet with SimCLR pre-training, in JAX.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo", _demo, "run the whole path, on drawn faces or your UTKFace archive; one report"
    )
    demo.add_argument(
        "--data", nargs="+", help="UTKFace zip, tar(s) or folder (default: drawn faces)"
    )
    demo.add_argument("--workdir", default="demo", help="folder for the results (default: demo)")
    demo.add_argument(
        "--root", default="", help="folder for built data (default: the user's cache)"
    )
    demo.add_argument("--tiny", action="store_true", help="a few steps only, to see that it runs")

    prepare = add("prepare", _prepare, "build a data set from a downloaded archive or folder")
    _add_prepare_arguments(prepare)

    weights = add("import-timm", _import_timm, "weights of timm's CoAtNets as a run to start from")
    weights.add_argument(
        "source", help="a name (coatnet_nano_rw_224.sw_in1k), or a .safetensors or .pth file"
    )
    weights.add_argument("--workdir", required=True, help="folder to write, for config.init_from")
    weights.add_argument("--model", help="which model it is, where the file's name does not say")

    explore = add("explore", _explore, "what is in a prepared set: one page with pictures, a CSV")
    explore.add_argument("--name", default="utkface", help="name of the set (default: utkface)")
    explore.add_argument(
        "--root", default="", help="folder for built data (default: the user's cache)"
    )
    explore.add_argument("--out", help="folder for the page (default: explore/NAME)")

    for name, text in TRAINING.items():
        add(name, None, text)  # `_training_help` knows their flags

    tune = add(
        "tune", None, "hyperparameters of fine-tuning: checks, learning rate, weight decay, search"
    )
    _add_training_arguments(tune, "finetune")
    _add_tune_arguments(tune)

    embed = add("embed", _embed, "what a run's features know of age, beside untrained ones")
    evaluate = add("evaluate", _evaluate, "four-class accuracy and age error of a fine-tuned run")
    for command, split, splits, out in (
        (
            embed,
            "validation",
            "validation, test or validation+test",
            "RUN/embed; of other faces than the run's validation split RUN/embed-…",
        ),
        (
            evaluate,
            "test",
            "train, validation, test, several joined (train+test) or all; refused where the run "
            "was trained on its faces",
            "RUN/evaluate/SPLIT; without RUN evaluation/SPLIT, with --small evaluation_small/SPLIT",
        ),
    ):
        command.add_argument("--split", default=split, help=f"{splits} (default: {split})")
        command.add_argument("--out", help=f"folder for the results (default: {out})")
        command.add_argument("--name", help="another prepared data set than the run's own")
        command.add_argument("--root", help="folder for built data (default: the run's)")
        command.add_argument("--no-faces", action="store_true", help="no picture that shows faces")
    embed.add_argument("run_dir", help="workdir of a training run")
    evaluate.add_argument(
        "run_dir",
        nargs="?",
        metavar="RUN",
        help="workdir of a fine-tuning run (default: the model that comes with the package)",
    )
    embed.add_argument(
        "--max-points", type=int, default=2000, help="faces in the pictures (default: 2000)"
    )
    embed.add_argument(
        "--perplexity",
        nargs="+",
        type=float,
        default=[30, 10, 100],
        metavar="P",
        help="of t-SNE; the first is drawn by every label (default: 30 10 100)",
    )
    embed.add_argument("--umap", action="store_true", help="UMAP too (needs umap-learn)")
    evaluate.add_argument("--on", dest="name", help="the same as --name")
    evaluate.add_argument(
        "--splits", help="table of splits (default: the run's own, of another set `default`)"
    )
    evaluate.add_argument(
        "--which", default="best", help="checkpoint: best, latest or a step (default: best)"
    )
    evaluate.add_argument(
        "--decode",
        help="age read from the probabilities: median, mean, argmax (default: the run's)",
    )
    evaluate.add_argument(
        "--no-flip", action="store_true", help="do not average with the mirror image"
    )

    compare = add("compare", _compare, "runs side by side: paired differences, means over seeds")
    compare.add_argument(
        "run_dirs",
        nargs="+",
        metavar="RUN",
        help="workdirs; every other run is compared with the first",
    )
    compare.add_argument(
        "--on",
        dest="evaluation",
        default="test",
        help="folder in RUN/evaluate to compare (default: test)",
    )
    compare.add_argument(
        "--out", default="comparison", help="folder for the results (default: comparison)"
    )

    predict = add("predict", _predict, "ages of the faces in photos: a table, a CSV, pictures")
    predict.add_argument(
        "paths",
        nargs="+",
        metavar="[RUN] PATH",
        help="pictures or folders; before them the workdir of a fine-tuning run, where it is to be "
        "another model than the one that comes with the package",
    )
    predict.add_argument("--out", help="folder for the results (default: predictions)")
    predict.add_argument(
        "--no-detect",
        action="store_true",
        help="the pictures are face crops already: take each one whole",
    )

    release = add("release", _release, "a fine-tuned run as a small folder with a model card")
    release.add_argument("run_dir", help="workdir of a fine-tuning run")
    release.add_argument("--out", required=True, help="folder to write")
    release.add_argument(
        "--max-mb",
        type=float,
        metavar="MB",
        help="round the weights to 8-bit integers where they take more in bfloat16",
    )
    release.add_argument("--root", help="folder for built data (default: the run's)")

    for command in (evaluate, predict):
        command.add_argument(
            "--small",
            action="store_true",
            help="with the small model of the package: less exact, faster on a CPU",
        )
    for command in (evaluate, release):
        command.add_argument(
            "--sides",
            nargs="+",
            type=float,
            metavar="SHARE",
            help="average over the centres with these shares of the side (default: the run's own)",
        )

    soup = add("soup", _soup, "the mean of the weights of fine-tuned runs, as a run of its own")
    soup.add_argument("run_dirs", nargs="+", metavar="RUN", help="workdirs of fine-tuning runs")
    soup.add_argument("--workdir", required=True, help="folder to write")
    soup.add_argument(
        "--uniform", action="store_true", help="of all runs (default: those that help validation)"
    )
    soup.add_argument("--root", help="folder for built data (default: the first run's)")

    models = add("models", _models, "the backbones: size, multiply-adds, feature width, source")
    models.add_argument("names", nargs="*", metavar="NAME", help="backbones (default: all)")
    models.add_argument("--image-size", type=int, default=224, help="in pixels (default: 224)")
    return parser


def _add_prepare_arguments(prepare: argparse.ArgumentParser) -> None:
    from input_pipeline.layouts import CHOICES

    add = prepare.add_argument
    add("source", nargs="+", help="zip, tar(s) or folder with the pictures")
    add("--name", default="", help="name of the set (default: that of its layout)")
    add("--root", default="", help="folder for built data (default: the user's cache)")
    add("--layout", default="auto", choices=CHOICES, help="how ages are given (default: auto)")
    add("--labels", action="append", default=[], metavar="CSV", help="table of path, age, …")
    add("--age-column", default="", metavar="NAME", help="column of the table with the age")
    add(
        "--splits",
        action="append",
        default=[],
        metavar="NAME=CSV",
        help="add a published split: a CSV of file and split (may be repeated)",
    )
    add(
        "--drop-conflicts",
        type=int,
        metavar="YEARS",
        help="leave out copies of one picture whose ages lie further apart",
    )
    add(
        "--crop-faces",
        action="store_true",
        help="the pictures are photos: cut out the face, leave out those without exactly one",
    )
    add("--preprocess", default="", metavar="STEPS", help="done once: unsharp, denoise, or both")
    add("--beam", default="", metavar="RUNNER", help="build with Apache Beam: DirectRunner, …")
    add("--beam-option", action="append", default=[], metavar="--KEY=VALUE", help="for the runner")


def _named_paths(pairs: list[str]) -> dict[str, str]:
    """{name: path} of `NAME=PATH` arguments."""
    paths = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not (name and path):
            raise ValueError(f"--splits={pair}: give a name and a file, as in mine=split.csv")
        if name in paths:
            raise ValueError(f"--splits={pair}: {name} is {paths[name]} already; give another name")
        paths[name] = path
    return paths


def _demo(arguments: argparse.Namespace) -> None:
    from coatnet_jax.demo import run

    run(arguments.data, Path(arguments.workdir), root=arguments.root, tiny=arguments.tiny)


def _prepare(arguments: argparse.Namespace) -> None:
    from coatnet_jax.paths import data_folder
    from input_pipeline.prepare import prepare

    transform = _preprocess(arguments)
    info = prepare(
        arguments.source,
        data_folder("", arguments.root),
        name=arguments.name,
        layout=arguments.layout,
        labels=arguments.labels,
        age_column=arguments.age_column,
        splits=_named_paths(arguments.splits),
        drop_conflicts=arguments.drop_conflicts,
        beam_runner=arguments.beam,
        beam_options=arguments.beam_option,
        transform=transform,
        transform_id=transform.id if transform else "",
    )
    if info["name"] != "utkface":
        print(f"train on it with --config.data.name={info['name']}")


def _import_timm(arguments: argparse.Namespace) -> None:
    from coatnet_jax.pretrained import run

    run(arguments.source, Path(arguments.workdir), model=arguments.model)


def _preprocess(arguments: argparse.Namespace):
    """What is to be done to each picture at build time, None for nothing."""
    from input_pipeline.preprocess import Preprocess, parse_steps

    steps = parse_steps(arguments.preprocess)
    if not steps and not arguments.crop_faces:
        return None
    find = _detector("without --crop-faces pictures stay whole") if arguments.crop_faces else None
    return Preprocess(steps, find)


def _explore(arguments: argparse.Namespace) -> None:
    from coatnet_jax.explore import run
    from coatnet_jax.paths import data_folder

    run(data_folder(arguments.name, arguments.root), out=arguments.out)


def _run_data(arguments: argparse.Namespace) -> Path:
    """Folder of the data set to measure on: the run's own unless another is named."""
    return _data_of(arguments.run_dir, name=arguments.name, root=arguments.root)


def _data_of(run_dir: str, *, name: str | None = None, root: str | None = None) -> Path:
    from coatnet_jax.config import read_config
    from coatnet_jax.paths import data_folder

    data = read_config(Path(run_dir) / "config.json").data
    return data_folder(name or data.name, data.root if root is None else root)


def _embed(arguments: argparse.Namespace) -> None:
    from coatnet_jax.embed import run

    run(
        Path(arguments.run_dir),
        _run_data(arguments),
        split=arguments.split,
        out=arguments.out,
        max_points=arguments.max_points,
        perplexity=arguments.perplexity,
        with_umap=arguments.umap,
        show_faces=not arguments.no_faces,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from coatnet_jax.evaluate import run

    arguments.run_dir = str(_model(arguments.run_dir, small=arguments.small))
    run(
        Path(arguments.run_dir),
        _run_data(arguments),
        training_folder=_training_data(arguments),
        split=arguments.split,
        out=arguments.out,
        flip=not arguments.no_flip,
        which=arguments.which,
        splits=arguments.splits,
        show_faces=not arguments.no_faces,
        decode=arguments.decode,
        sides=arguments.sides,
    )


def _training_data(arguments: argparse.Namespace) -> Path:
    """Folder of the set that the run was trained on: under --root, else where it was then."""
    given = _data_of(arguments.run_dir, root=arguments.root)
    then = _data_of(arguments.run_dir)
    return then if then.is_dir() and not given.is_dir() else given


def _compare(arguments: argparse.Namespace) -> None:
    from coatnet_jax.compare import run
    from coatnet_jax.evaluate import run as evaluate

    run(
        arguments.run_dirs,
        evaluation=arguments.evaluation,
        out=arguments.out,
        # Where it is looked for, also of a packaged model, whose own reports lie elsewhere.
        evaluate=(lambda path: evaluate(path, _data_of(path), out=path / "evaluate" / "test"))
        if arguments.evaluation == "test"
        else None,
    )


def _predict(arguments: argparse.Namespace) -> None:
    from coatnet_jax.paths import home
    from coatnet_jax.predict import run, split_run

    find = None if arguments.no_detect else _detector("--no-detect takes face crops as they are")
    run_dir, inputs = split_run(arguments.paths)
    run_dir = _model(run_dir, small=arguments.small)
    run(run_dir, inputs, find=find, out=arguments.out, programs=home() / "compiled")


def _model(run_dir: str | Path | None, *, small: bool) -> str | Path:
    """Folder of the run that is named, or of the packaged model, or of the small one."""
    from coatnet_jax.release_weights import PACKAGED, SMALL

    if run_dir and small:
        raise ValueError(
            f"{run_dir} and --small are two models: leave out --small, which is one of the package"
        )
    return run_dir or (SMALL if small else PACKAGED)


def _detector(otherwise: str):
    """The face detector; where its weights are missing, the error also says what to do without."""
    from input_pipeline.face_crops import Detector

    try:
        return Detector()
    except ValueError as error:
        raise ValueError(f"{error}; {otherwise}") from None


def _release(arguments: argparse.Namespace) -> None:
    from coatnet_jax.release import write_release

    data = _data_of(arguments.run_dir, root=arguments.root)
    write_release(
        Path(arguments.run_dir),
        data,
        Path(arguments.out),
        sides=arguments.sides,
        max_mb=arguments.max_mb,
    )


def _soup(arguments: argparse.Namespace) -> None:
    from coatnet_jax.soup import run

    data = _data_of(arguments.run_dirs[0], root=arguments.root)
    run(arguments.run_dirs, Path(arguments.workdir), data, uniform=arguments.uniform)


def _models(arguments: argparse.Namespace) -> None:
    from coatnet_jax.model_table import run

    run(arguments.names, image_size=arguments.image_size)
