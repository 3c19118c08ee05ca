"""timm's trained CoAtNets as a run folder: `config.init_from` starts from it, `embed` looks at it.

The weights are a local file or come from the Hugging Face hub. What the images have to be like
travels along in config.json: mean, standard deviation, size.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from coatnet_jax.augment import IMAGE_MEAN, IMAGE_STD
from coatnet_jax.checkpoint import check_unused, save_variables
from coatnet_jax.coatnet_rw import RW_VARIANTS
from coatnet_jax.import_timm import image_size, import_timm
from coatnet_jax.logs import write_run_info
from coatnet_jax.weight_files import read_weights
from input_pipeline.errors import first_line

NAMES = (
    "coatnet_nano_rw_224.sw_in1k",
    "coatnet_0_rw_224.sw_in1k",
    "coatnet_1_rw_224.sw_in1k",
    "coatnet_2_rw_224.sw_in12k_ft_in1k",
    "coatnet_2_rw_224.sw_in12k",
    "coatnet_3_rw_224.sw_in12k",
    "coatnet_bn_0_rw_224.sw_in1k",
    "coatnet_rmlp_nano_rw_224.sw_in1k",
    "coatnet_rmlp_1_rw_224.sw_in1k",
    "coatnet_rmlp_1_rw2_224.sw_in12k_ft_in1k",
    "coatnet_rmlp_1_rw2_224.sw_in12k",
    "coatnet_rmlp_2_rw_224.sw_in1k",
    "coatnet_rmlp_2_rw_224.sw_in12k_ft_in1k",
    "coatnet_rmlp_2_rw_224.sw_in12k",
    "coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k",
)
PAPER = tuple(f"coatnet_{n}" for n in range(5))  # timm's coatnet_5 has other heads than the paper's
MODELS = (*PAPER, *RW_VARIANTS)
FILES = (".safetensors", ".pth", ".pt", ".bin")


def run(source: str, workdir: Path, *, model: str | None = None) -> None:
    """Write config.json, run.json and a checkpoint of timm's weights `source` into `workdir`.

    `source` is one of `NAMES` (downloaded by huggingface-hub), a .safetensors or .pth file, or the
    hub's folder of one; timm's config.json beside the weights is read. `model` says whose weights
    they are where neither that nor the file's name does. Raises FileNotFoundError or
    ValueError in one line for a name or file that is not there, cannot be read or fits no model,
    and where `workdir` holds a run already.
    """
    check_unused(workdir, flag="--workdir")
    path = _local_file(Path(source)) if _is_file(source) else download(source)
    state = read_weights(path)
    about = _about(path)
    timm_name = model or about.get("architecture") or path.name
    name = model_name(timm_name)
    variables = import_timm(state, name)
    config = run_config(name, state, about.get("pretrained_cfg", about), timm_name=timm_name)
    with path.open("rb") as file:
        config.timm.update(file=path.name, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    save_variables(workdir, variables)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    write_run_info(workdir, config, data_fingerprint="", parameters=parameters)
    print(
        f"{name}, {parameters / 1e6:.2f} M parameters, {config.model.image_size} px, mean "
        f"{config.model.mean}, std {config.model.std}; written to {workdir}: start from it with "
        f"--config=finetune:{name} {shlex.quote(f'--config.init_from={workdir}')}"
    )


def model_name(timm_name: str) -> str:
    """Our name for timm's: without resolution and tag, found at the start of a file's name too.

    Raises ValueError for what is none of `MODELS`, with the near ones.
    """
    stem = Path(timm_name).name.removesuffix(".safetensors")
    name = re.split(r"_\d{3}(?!\d)|\.", stem)[0]
    if name in MODELS:
        return name
    near = difflib.get_close_matches(name, MODELS, n=3) or MODELS
    raise ValueError(
        f"{timm_name!r} does not name a CoAtNet of timm's that can be imported; near: "
        f"{', '.join(near)}; for a file say which with --model"
    )


def run_config(
    name: str, state: dict[str, np.ndarray], about: dict[str, Any], *, timm_name: str
) -> ml_collections.ConfigDict:
    """The config of the run: what `embed` and `init_from` need, and under `timm` where it is from.

    `about` is timm's own description; where it is silent, timm's values for this model are taken.
    """
    imagenet = name == "coatnet_bn_0_rw"
    named = re.search(r"_(\d{3})(?!\d)", timm_name)
    size = int(named[1]) if named else 224
    size = _three_numbers(about, "input_size", otherwise=(3, size, size))[-1]
    grey = (0.5, 0.5, 0.5)
    config = ml_collections.ConfigDict()
    config.stage = "timm"
    config.seed = 0
    config.model = {
        "name": name,
        "image_size": image_size(state, otherwise=size),
        "mean": _three_numbers(about, "mean", otherwise=IMAGE_MEAN if imagenet else grey),
        "std": _three_numbers(about, "std", otherwise=IMAGE_STD if imagenet else grey),
        "drop_path": 0.0,
        "dtype": "float32",
        "classes": len(state["head.fc.weight"]),
    }
    config.data = {
        "root": "",
        "name": "utkface",
        "splits": "default",
        "image_size": config.model.image_size,
        "workers": 0,
    }
    config.timm = {"name": timm_name, "file": "", "sha256": ""}
    for key in ("interpolation", "crop_pct", "license"):  # of timm's own evaluation, for the record
        if key in about:
            config.timm[key] = about[key]
    return config


def _three_numbers(
    about: dict[str, Any], key: str, *, otherwise: tuple[float, ...]
) -> tuple[float, ...]:
    value = about.get(key, otherwise)
    listed = isinstance(value, (list, tuple)) and len(value) == 3
    if not listed or not all(isinstance(number, (int, float)) for number in value):
        raise ValueError(
            f"config.json beside the weights says {key} {value!r}, three numbers are wanted: mend "
            "it, or take it away"
        )
    return tuple(value)


def download(name: str) -> Path:
    """The file of one of `NAMES` from the Hugging Face hub, with timm's config.json beside it.

    Raises ValueError for another name, and where the hub or its package is not at hand, with the
    address of the file.
    """
    name = name.removeprefix("hf_hub:").removeprefix("hf-hub:").removeprefix("timm/")
    known = [full for full in NAMES if name in (full, full.split(".")[0], full.split("_224")[0])]
    if not known:
        near = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        raise ValueError(
            f"{name!r} is neither a file nor one of timm's trained CoAtNets; near: "
            f"{', '.join(near)}"
        )
    address = f"https://huggingface.co/timm/{known[0]}/resolve/main/model.safetensors"
    by_hand = f"download {address} and give the file, with --model={known[0]}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            f"to fetch {known[0]} install huggingface-hub (pip install 'coatnet-jax[hub]'), or "
            f"{by_hand}"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for file in ("config.json", "model.safetensors"):
            path = hf_hub_download(f"timm/{known[0]}", file)
    except Exception as error:  # the hub raises many kinds where it cannot be reached
        raise ValueError(f"{known[0]} cannot be fetched ({first_line(error)}); {by_hand}") from None
    return Path(path)


def _is_file(source: str) -> bool:
    return Path(source).exists() or source.endswith(FILES) or source.startswith((".", "/", "~"))


def _local_file(path: Path) -> Path:
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return path / "model.safetensors"
    return path


def _about(path: Path) -> dict[str, Any]:
    """timm's config.json beside the weights; nothing where there is none of that kind."""
    try:
        about = json.loads((path.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(about, dict) or not isinstance(about.get("architecture"), str):
        return {}
    return about if isinstance(about.get("pretrained_cfg", {}), dict) else {}
