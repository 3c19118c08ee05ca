"""Test settings: eight forced host devices, absl flags for Grain's workers, small face sets."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small models are compiled far longer than they run. Without LLVM's optimisation and with XLA's
# older way to emit loops (below) a test of a training step takes less than half of the time. The
# operations and their fusion stay as they are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import functools
import importlib.util
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jax
import make_timm_fixtures
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

OLDER_LOOPS = "--xla_cpu_use_fusion_emitters=false"


def is_known(flag: str) -> bool:
    """Whether JAX starts with a flag of XLA, which ends the process where it knows it no more."""
    environment = os.environ | {"XLA_FLAGS": flag}
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(start, env=environment, capture_output=True).returncode == 0


if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers inherit what is set here
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # On a busy machine eight devices on two cores meet late; XLA would abort after 40 seconds.
        + " --xla_cpu_collective_call_terminate_timeout_seconds=600 "
        + (OLDER_LOOPS if is_known(OLDER_LOOPS) else "")
    )

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def real_faces() -> Path:
    """Folder with the tars of real UTKFace faces (COATNET_JAX_FACES), or skip with the reason."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COATNET_JAX_FACES", default))
    if not list(folder.glob("utkface-*.tar")):
        pytest.skip(
            f"no utkface-*.tar in {folder}; set COATNET_JAX_FACES to run this on real faces"
        )
    return folder


@pytest.fixture(scope="session")
def timm():
    """timm, or skip where the extra `parity` is not installed."""
    for package in ("torch", "timm"):  # found, not imported: timm wants torchvision first
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[parity]' to run this")
    return make_timm_fixtures.timm()


@pytest.fixture(scope="session")
def drawn_root(tmp_path_factory) -> Path:
    """A data root that holds 160 drawn faces, prepared under the name `drawn`."""
    from input_pipeline.prepare import prepare
    from input_pipeline.synthetic_faces import write_drawn_faces

    root = tmp_path_factory.mktemp("data")
    pictures = write_drawn_faces(root / "pictures", count=160, size=48, seed=0)
    prepare([str(pictures)], root, name="drawn", progress=lambda *_: None)
    return root


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """What one module compiled is dropped before the next, for `spare_maps`."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def spare_maps():
    """Every compiled step maps memory a thousand times, and Linux ends a process that maps more
    than 65,530 times (vm.max_map_count): before that, what was compiled is dropped."""
    yield
    with suppress(OSError), open("/proc/self/maps", "rb") as maps:  # as Linux alone has it
        if sum(1 for _ in maps) > 30_000:
            jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What the module compiles is read back the next time it is compiled. For models on
    one device: what is compiled for the eight forced here would be written down for nothing."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # without it, the cache would be written to the end


@pytest.fixture(scope="module")
def small_atto(compiled_once):
    """A smaller `coatnet_atto`, compiled once for the module; called with the modules that make a
    mesh, it has them take one device. Where the run is tested, compile time is most of the time."""
    from coatnet_jax import coatnet, sharding

    with pytest.MonkeyPatch.context() as patch:
        small = coatnet.CoAtNetConfig((8, 8, 16, 32, 32), (1, 1, 1, 1, 1))
        patch.setitem(coatnet.VARIANTS, "coatnet_atto", small)

        def on_one_device(*users):
            for user in users:
                patch.setattr(user, "make_mesh", functools.partial(sharding.make_mesh, 1))

        yield on_one_device
