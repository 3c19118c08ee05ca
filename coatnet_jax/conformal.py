"""Intervals that hold the age of 90 % of new faces, whatever the model believes: split conformal.

Conformalized quantile regression (Romano, Patterson & Candès 2019, arXiv 1905.03222): the 5 % and
95 % quantiles of the posterior are moved outwards (or inwards) by one number of years, chosen on
the validation split so that enough of its faces lie inside. The promise is for faces like those of
the validation split, on average over all of them; not for each group, and not for other pictures.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from coatnet_jax.ages import N_AGES, age_quantile, get_decoder
from input_pipeline.files import write_whole

FILE = "conformal.json"
LEVEL = 0.9
METHOD = "split conformal, quantile regression form (CQR, arXiv 1905.03222)"


def widening(
    p: Float[np.ndarray, "n 117"], age: Int[np.ndarray, " n"], *, level: float = LEVEL
) -> float:
    """Years by which the central interval of the posterior has to be widened; below 0, narrowed.

    The ceil((n + 1) level)-th smallest of max(low - age, age - high). An end at 0 or 116 years
    stays there, so nobody lies beyond it: without that, infants would share one score, and
    coverage would jump past the level. Raises ValueError when the faces are too few for it.
    """
    n = len(age)
    rank = math.ceil((n + 1) * level - 1e-9)
    if rank > n:
        need = math.ceil(level / (1 - level) - 1e-9)
        raise ValueError(f"{n} faces cannot calibrate {100 * level:.0f} %: it takes {need} or more")
    low, high = age_quantile(p, (1 - level) / 2), age_quantile(p, (1 + level) / 2)
    below = np.where(low > 0, low - age, -np.inf)
    above = np.where(high < N_AGES - 1, age - high, -np.inf)
    return max(float(np.sort(np.maximum(below, above))[rank - 1]), -float(N_AGES))


def conformal_interval(
    p: Float[np.ndarray, "... 117"], years: float, *, level: float = LEVEL, decode: str = "median"
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """(low, high) in years: the posterior's central interval, `years` wider at both ends.

    Held to 0-116, where an end that is there already stays, and always holding the answer itself
    (the age that `decode` reads); neither can lose coverage.
    """
    answer = get_decoder(decode)(np.asarray(p, np.float64))
    low, high = posterior_interval(p, level=level)
    low = np.where(low > 0, low - years, low)
    high = np.where(high < N_AGES - 1, high + years, high)
    low, high = (np.clip(end, 0, N_AGES - 1) for end in (low, high))
    return np.minimum(low, answer), np.maximum(high, answer)


def posterior_interval(
    p: Float[np.ndarray, "... 117"], *, level: float = LEVEL
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """(low, high) in years: the posterior's own central interval, whether it is right or not."""
    return age_quantile(p, (1 - level) / 2), age_quantile(p, (1 + level) / 2)


def save_constants(run_dir: Path, constants: Mapping[str, Any]) -> Path:
    """Write `RUN/conformal.json`, which `predict` reads."""
    path = Path(run_dir) / FILE
    write_whole(path, json.dumps({"method": METHOD, **constants}, indent=2) + "\n")
    return path


def read_constants(run_dir: Path, *, step: int) -> dict[str, Any] | None:
    """What lies in `RUN/conformal.json`; None where there is no file or it is of another step.

    Raises ValueError in one line where the file is damaged.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        return None
    try:
        constants = json.loads(path.read_text())
        years = float(constants["years"])
        right = constants["step"] == step and constants["level"] == LEVEL
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path} is damaged: delete it, or write it again with coatnet-jax evaluate {run_dir}"
        ) from None
    return {**constants, "years": years} if right and math.isfinite(years) else None
