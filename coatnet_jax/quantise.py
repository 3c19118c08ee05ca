"""Weights as 8-bit integers whose steps are as fine as a file may be large.

A kernel becomes integers and, for each output channel, the step that they count. Where the file has
room a step is a 127th of the channel's largest weight. Where it has not, steps grow with the root
of how many values a kernel has, for that loses least: rounding errors add up over a model while
bits are paid by the value, so a bit taken from a large kernel saves more and costs the same. Coarse
steps leave few different integers, and those that occur often take fewer bits in the file
(`weight_files.weights_data`).
"""

from collections.abc import Mapping

import numpy as np

STEP = ":step"  # ends the name of the steps [out] of the integers [..., out] of the same name
LARGEST = 127
LEAST = 2**14  # values; kernels with fewer stay as they are: all of them weigh next to nothing


def quantise(arrays: Mapping[str, np.ndarray], coarseness: float) -> dict[str, np.ndarray]:
    """The arrays, those that `is_quantised` as int8 [..., out] and, with `STEP`, float32 [out].

    A step is `coarseness` times the root mean square of its channel's weights times the root of how
    many the kernel has, or a 127th of the channel's largest weight, whichever is larger.
    """
    result = {}
    for name, array in arrays.items():
        if is_quantised(name, array):
            integers, steps = _quantise(array, coarseness)
            result |= {name: integers, name + STEP: steps}
        else:
            result[name] = array
    return result


def dequantise(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with integers and steps multiplied; whatever else is there comes back as it is.

    Raises ValueError where steps are not those of an array beside them.
    """
    result = {name: array for name, array in arrays.items() if not name.endswith(STEP)}
    for name in arrays.keys() - result.keys():
        steps, of = arrays[name], name.removesuffix(STEP)
        if of not in result or steps.shape != result[of].shape[-1:]:
            raise ValueError(f"{name} fits no array beside it")
        result[of] = result[of] * steps
    return result


def is_quantised(name: str, array: np.ndarray) -> bool:
    """Whether an array is a kernel that is worth it."""
    return name.endswith("/kernel") and array.size >= LEAST


def coarsest(arrays: Mapping[str, np.ndarray]) -> float:
    """The coarseness with which the largest kernel's steps are as large as its weights are in the
    root mean square. Raises ValueError where no array `is_quantised`."""
    sizes = [array.size for name, array in arrays.items() if is_quantised(name, array)]
    if not sizes:
        raise ValueError(f"no kernel has {LEAST} weights, so none would be smaller as integers")
    return max(sizes) ** -0.5


def _quantise(array: np.ndarray, coarseness: float) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(array, np.float32)
    per_channel = array.reshape(-1, array.shape[-1])
    needed = np.abs(per_channel).max(0) / LARGEST
    wanted = coarseness * array.size**0.5 * np.sqrt(np.square(per_channel).mean(0))
    steps = np.maximum(needed, wanted)
    steps[steps == 0] = 1  # of a channel without weights
    return np.rint(array / steps).astype(np.int8), steps
