"""Multiply-accumulates of a function, counted from its jaxpr: nothing is compiled or run.

Counted are matrix products and convolutions, with the zeros of the padding, as papers do; the
products of queries with keys and of attention weights with values are among them. Activations,
norms, pooling and the additions of shortcuts are not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from coatnet_jax.depthwise import auto_means


def count_macs(function: Callable, images: Any) -> tuple[int, Any]:
    """(multiply-accumulates of `function(images)`, shapes and dtypes of what it returns).

    `images` is an array or its shape. Products in which it has no part, such as the look-up of
    relative positions, do not count: they are done once for any number of images. The same on
    every backend. Raises ValueError for a loop whose length the jaxpr does not hold.
    """
    with auto_means("lax"):  # one operation whose size can be read
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(images)
    return _of_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.invars)), shapes


def _of_jaxpr(jaxpr, from_images: Sequence[bool]) -> int:
    """`from_images` says of every input whether it was computed from the images."""
    total, known = 0, {var for var, yes in zip(jaxpr.invars, from_images, strict=True) if yes}
    for equation in jaxpr.eqns:
        flags = [not hasattr(var, "val") and var in known for var in equation.invars]
        if any(flags):
            total += _of_equation(equation, flags)
            known.update(equation.outvars)
    return total


def _of_equation(equation, from_images: Sequence[bool]) -> int:
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        kernel, out_axis = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return equation.outvars[0].aval.size * (kernel.size // kernel.shape[out_axis])
    if kind == "cond":  # its first input chooses the branch
        return max(_of_jaxpr(branch, from_images[1:]) for branch in _inner_jaxprs(params))
    if kind == "while":
        inner = [_of_jaxpr(j, [True] * len(j.invars)) for j in _inner_jaxprs(params)]
        if any(inner):
            raise ValueError("cannot count a while loop: its jaxpr does not say how often it turns")
        return 0
    turns = params["length"] if kind == "scan" else 1
    return turns * sum(_of_jaxpr(jaxpr, from_images) for jaxpr in _inner_jaxprs(params))


def _inner_jaxprs(params: dict) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
