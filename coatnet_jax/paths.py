"""Where things lie: built data and caches in one folder, and the configs in the package.

What the user names is expanded by `os.path`, here and elsewhere: `Path.expanduser` raises
RuntimeError for `~nobody/faces`, of which the rest is to say that it does not exist.
"""

import os
from pathlib import Path


def home() -> Path:
    """Folder for built data and caches: $COATNET_JAX_HOME or `coatnet-jax` in the user's cache."""
    if chosen := os.environ.get("COATNET_JAX_HOME"):
        return Path(os.path.expanduser(chosen))
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "coatnet-jax"


def data_folder(name: str, root: str = "") -> Path:
    """Folder of the prepared data set `name` under `root` (empty: `home()`); it need not exist."""
    return (Path(os.path.expanduser(root)) if root else home()) / name


def configs_folder() -> Path:
    """Folder of the shipped configs: inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
