"""Configs by name or path, with ml_collections flags on top; saved as JSON beside every result."""

import difflib
import importlib.util
import json
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from coatnet_jax.paths import configs_folder
from input_pipeline.files import write_whole


class UnknownWord(ValueError):
    """A word of the command line that is not known, as argparse tells by the same exit status."""

    exit_status = 2


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Config from `name[:words]` (a shipped config) or `path.py[:words]`.

    Raises FileNotFoundError where there is no such config, ValueError where its words are unknown.
    """
    return _load(spec)[0]


def describe_config(spec: str) -> str:
    """What the words of a config mean, which its docstring says, and all keys with their values."""
    config, module = _load(spec)
    values = flat(config.to_dict())
    width = max(map(len, values))
    return "\n".join(
        [
            (module.__doc__ or "").strip(),
            "",
            f"Keys, with their values in --config={spec}. What each one does is said beside it in",
            f"{module.__file__}. A tuple wants quotes: --config.KEY='(0.5, 1.0)'.",
            "",
            *(f"    --config.{key:{width}}  {value!r}" for key, value in values.items()),
        ]
    )


def _load(spec: str) -> tuple[ml_collections.ConfigDict, ModuleType]:
    """A config, and the module that made it."""
    name, _, words = spec.partition(":")
    path = Path(name)
    if path.suffix != ".py":
        path = configs_folder() / f"{name}.py"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in configs_folder().glob("[a-z]*.py")))
        raise FileNotFoundError(
            f"no config {spec!r}: give a path to a .py file or one of the shipped ones: {shipped}"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config function, so it is not a config")
    return module.get_config(words) if words else module.get_config(), module


def named_config(argv: Sequence[str], *, default: str) -> str:
    """The last `--config=…` of a command line whose values are joined."""
    given = [arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")]
    return given[-1] if given else default


def check_words(words: Sequence[str], known: Sequence[str], *, stage: str) -> None:
    """Raise ValueError where a word after a config's colon is not a `known` one."""
    for word in words:
        if word not in known:
            raise ValueError(
                f"{stage} config {','.join(words)!r}: {word!r} is not one of {', '.join(known)}"
            )


def only_one(words: Sequence[str], known: Container[str], what: str, *, stage: str) -> str | None:
    """The one of `words` that is `known`, None where none is; ValueError for two."""
    found = [word for word in words if word in known]
    if len(found) > 1:
        raise ValueError(f"{stage} config: {' and '.join(found)} are two {what}, give one")
    return found[0] if found else None


def parse_training_flags(
    argv: list[str], *, default: str
) -> tuple[ml_collections.ConfigDict, Path]:
    """(config, workdir) from `--config=… --config.key=value … --workdir=…`.

    Raises UnknownWord in one line for an unknown flag or key (with near names), ValueError for a
    value of the wrong type or a missing workdir.
    """
    argv = join_values(argv)
    config = load_config(named_config(argv, default=default))
    rest = [arg for arg in argv if not arg.startswith("--config=")]
    for arg in rest:
        name = arg.split("=", 1)[0].removeprefix("--")
        if name.startswith("config.") and name.partition("[")[0][7:] not in flat_keys(config):
            raise UnknownWord(_unknown_flag(name, config))
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *rest])
    flags.DEFINE_string("workdir", None, "Folder for checkpoints and results.", flag_values=values)
    try:
        extra = values(["coatnet-jax", *rest])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UnknownWord(_unknown_flag(error.flagname, config)) from None
    except (flags.Error, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"bad flag: {' '.join(str(error).split())}") from None
    if extra:
        raise UnknownWord(
            f"unexpected argument {extra[0]!r}; flags look like --config.optim.lr=0.001"
        )
    if not values.workdir:
        raise ValueError("--workdir=FOLDER is missing: the folder for checkpoints and results")
    config = values.config
    for value, key in ((config, "init_from"), (config.get("data", {}), "root")):
        if value.get(key):  # a shell leaves the ~ of --config.init_from=~/run as it is
            value[key] = os.path.expanduser(value[key])
    return config, Path(os.path.expanduser(values.workdir))


def join_values(argv: list[str]) -> list[str]:
    """`--flag value` as `--flag=value`, so that one form has to be understood below."""
    joined: list[str] = []
    for arg in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and arg[:2] != "--":
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _unknown_flag(name: str, config: ml_collections.ConfigDict) -> str:
    known = ["config", "workdir", *(f"config.{key}" for key in flat_keys(config))]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean --{', --'.join(near)}?" if near else f"known: --{', --'.join(known)}"
    return f"unknown flag --{name}; {hint}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def flat_keys(config: ml_collections.ConfigDict) -> list[str]:
    """Dotted names of all leaves."""
    return list(flat(config.to_dict()))


def save_config(config: ml_collections.ConfigDict, path: Path) -> None:
    """Write the resolved config as JSON."""
    write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(path: Path) -> ml_collections.ConfigDict:
    """Config written by `save_config`; lists come back as tuples, as configs write them."""
    return ml_collections.ConfigDict(_tuples(read_json(path, wants=("stage", "model", "data"))))


def read_json(path: Path, *, wants: Sequence[str] = (), optional: bool = False) -> dict[str, Any]:
    """The object in one of the JSON files of a run.

    Raises FileNotFoundError where it is missing ({} where it is `optional`), ValueError where it is
    damaged or lacks a key that is wanted.
    """
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is not the folder of a training run"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise _damaged(path, str(error)) from None
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no object")
    if missing := [key for key in wants if key not in found]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return found


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({why}): put back what lay there, or run again what wrote it"
    )


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value
