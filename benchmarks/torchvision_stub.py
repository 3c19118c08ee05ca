"""Makes torchvision importable beside a torch without CUDA, and timm where there is none.

torchvision's wheels bring CUDA code: without it two operators, which nobody calls here, are missing
when it is imported. timm imports torchvision for models that are not compared.
"""

import importlib.util
import sys
from unittest import mock

_LIBRARIES = []


def make_importable() -> None:
    """Call it before torchvision or timm is imported; a second call does nothing."""
    if "torchvision" in sys.modules:
        return
    if importlib.util.find_spec("torchvision") is None:
        _stand_in()
    elif not _LIBRARIES:
        _define_operators()


def _define_operators() -> None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # the definitions last as long as this object


def _stand_in() -> None:
    names = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"]
    names += [".models", ".models.feature_extraction"]
    for name in names:
        sys.modules[f"torchvision{name}"] = mock.MagicMock(__path__=[], __spec__=None)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
