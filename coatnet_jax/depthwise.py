"""Depthwise convolution, as shifted multiply-adds where XLA's own is slow.

XLA lowers a grouped convolution on the CPU to a scalar loop that takes 30 times as long as its
arithmetic. A depthwise 3x3 kernel is nine slices, multiplied and added; its gradient is the same
once more. Elsewhere (GPU, TPU) `lax.conv_general_dilated` is the right choice.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

AT_ONCE = 2**15  # numbers in the rows that a turn of the kernel's gradient takes
IMPLEMENTATIONS = ("auto", "shifted", "lax")
_auto = contextvars.ContextVar("depthwise implementation", default=None)


@contextlib.contextmanager
def auto_means(implementation: str):
    """Within this context 'auto' is `implementation`, whatever the backend."""
    token = _auto.set(implementation)
    try:
        yield
    finally:
        _auto.reset(token)


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c"],
    *,
    stride: int = 1,
    implementation: str = "auto",
) -> Float[Array, "b h2 w2 c"]:
    """Convolves every channel with its own kernel of odd side k, padded by k // 2 zeros all round.

    The result has ceil(h / stride) rows and ceil(w / stride) columns and the dtype of `x`.
    `implementation` is 'shifted' (multiply-adds), 'lax', or 'auto': shifted on the CPU, lax
    elsewhere. Raises ValueError for another stride than 1 or 2, for a kernel of another shape and
    for an unknown implementation.
    """
    if stride not in (1, 2):
        raise ValueError(f"depthwise stride must be 1 or 2, not {stride}")
    k, c = kernel.shape[0], x.shape[-1]
    if k % 2 == 0 or kernel.shape != (k, k, c):
        raise ValueError(
            f"depthwise kernel is {kernel.shape}, but {c} channels need (k, k, {c}) with an odd k"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, not {implementation!r}")
    if implementation == "auto":
        on_this_backend = "shifted" if jax.default_backend() == "cpu" else "lax"
        implementation = _auto.get() or on_this_backend
    kernel = kernel.astype(x.dtype)
    if implementation == "lax":
        return _lax_conv(x, kernel, stride)
    b, h, w, c = x.shape
    groups = jax.device_count() if b % jax.device_count() == 0 else 1
    y = _shifted_conv(x.reshape(groups, b // groups, h, w, c), kernel, stride)
    return y.reshape(b, *y.shape[2:])


def _lax_conv(x, kernel, stride):
    side = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(stride, stride),
        padding=((side, side), (side, side)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


# Below, images are [groups, b, h, w, c]: a batch that lies on several devices is cut into as many
# groups, so that in the kernel's gradient each device loops over its own images.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_conv(x, kernel, stride):
    return _conv_padded(_pad_all_round(x, kernel), kernel, stride)


def _pad_all_round(x, kernel):
    side = kernel.shape[0] // 2
    return _pad(x, ((side, side), (side, side)))


def _pad(x, rows_and_columns):
    # The barrier keeps XLA from recomputing the padding inside each of the slices.
    return lax.optimization_barrier(jnp.pad(x, ((0, 0), (0, 0), *rows_and_columns, (0, 0))))


def _conv_padded(padded, kernel, stride):
    k = kernel.shape[0]
    rows, columns = ((size - k) // stride + 1 for size in padded.shape[2:4])
    taps = (
        _tap(padded, i, j, rows, columns, stride) * kernel[i, j] for i in range(k) for j in range(k)
    )
    return functools.reduce(jnp.add, taps)


def _tap(padded, i, j, rows, columns, stride):
    """The pixels that tap (i, j) of the kernel meets: [groups, b, rows, columns, c]."""
    last_row, last_column = i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1
    return padded[:, :, i:last_row:stride, j:last_column:stride]


def _forward(x, kernel, stride):
    padded = _pad_all_round(x, kernel)
    return _conv_padded(padded, kernel, stride), (padded, kernel)


def _backward(stride, saved, dy):
    padded, kernel = saved
    k = kernel.shape[0]
    h, w = padded.shape[2] - k + 1, padded.shape[3] - k + 1
    dx = _input_gradient(dy, kernel, stride, h, w)
    return dx, _kernel_gradient(padded, dy, k, stride).astype(kernel.dtype)


_shifted_conv.defvjp(_forward, _backward)


def _input_gradient(dy, kernel, stride, h, w):
    if stride == 1:
        return _conv_padded(_pad_all_round(dy, kernel), kernel[::-1, ::-1], 1)
    # Polyphase: tap i of output row r met row 2r + i - side. With three taps an even row was met
    # by tap 1 of one output row, an odd row by tap 2 of the output row above it and tap 0 of the
    # one below; columns alike. `meets` holds (tap, output row), the latter in the padded dy.
    groups, b, rows, columns, c = dy.shape
    k = kernel.shape[0]
    side = k // 2
    before, after = side // 2, (side + 1) // 2
    padded = _pad(dy, ((before, after), (before, after)))
    meets = {
        phase: [(i, (phase + side - i) // 2 + before) for i in range((phase + side) % 2, k, 2)]
        for phase in (0, 1)
    }

    def phase(row, column):
        return functools.reduce(
            jnp.add,
            (
                padded[:, :, p : p + rows, q : q + columns] * kernel[i, j]
                for i, p in meets[row]
                for j, q in meets[column]
            ),
        )

    phases = jnp.stack([jnp.stack([phase(r, s) for s in (0, 1)], axis=4) for r in (0, 1)], axis=3)
    return phases.reshape(groups, b, 2 * rows, 2 * columns, c)[:, :, :h, :w]


def _kernel_gradient(padded, dy, k, stride):
    """Sums tap x dy over images and pixels in float32: [k, k, c].

    A loop over the rows with k sums [images, k, columns, c], of all taps in a column of the kernel,
    that stay in the cache: a plain reduction over the leading axes walks the memory in steps of c.
    Where a row is short a turn takes that of several images.
    """
    groups, b, rows, columns, c = dy.shape
    most = min(b, max(1, AT_ONCE // (columns * c)))
    images = max(n for n in range(1, most + 1) if b % n == 0)

    def add_row(n, sums):
        image, row = n // rows * images, n % rows
        size = (groups, images, k, padded.shape[3], c)
        met = lax.dynamic_slice(padded, (0, image, row * stride, 0, 0), size)
        here = lax.dynamic_slice(dy, (0, image, row, 0, 0), (groups, images, 1, columns, c))
        here, met = here.astype(jnp.float32), met.astype(jnp.float32)
        last = stride * (columns - 1) + 1
        return tuple(
            total + met[:, :, :, j : j + last : stride] * here for j, total in enumerate(sums)
        )

    zeros = tuple(jnp.zeros((groups, images, k, columns, c), jnp.float32) for _ in range(k))
    sums = lax.fori_loop(0, b // images * rows, add_row, zeros)
    return jnp.stack([total.sum((0, 1, 3)) for total in sums], axis=1)
