"""CoAtNet: two stages of MBConv, then two of relative attention (Dai et al., arXiv 2106.04803).

The sizes are those of the paper's Tables 3, 9 and 12; what the paper leaves open (padding,
epsilons, pooling, where the expansion is counted from) follows timm's `coatnet_0_224`, whose
weights give the same logits here. Images and features are channels-last.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from coatnet_jax.batchnorm import BatchNorm, gelu
from coatnet_jax.conv import Conv3x3
from coatnet_jax.depthwise import depthwise_conv
from coatnet_jax.products import add_to_each, product

EXPANSION = 4  # of MBConv and of the feed-forward layer, counted from the block's own width
SMALLEST_IMAGE = 32


@dataclasses.dataclass(frozen=True)
class CoAtNetConfig:
    """Widths and depths of the stem and the four stages, and the width of an attention head.

    It also says what modules they are made of; timm's own family overrides that (`coatnet_rw`).
    """

    widths: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int, int]
    head_dim: int = 32

    def parts(self) -> tuple[Callable, Callable, Callable, Callable]:
        """The stem, the block of stages 1 and 2, that of 3 and 4, and what makes features."""
        return (
            functools.partial(Stem, self.widths[0], self.depths[0]),
            MBConv,
            functools.partial(Transformer, head_dim=self.head_dim),
            normed_mean,
        )


VARIANTS = {
    "coatnet_0": CoAtNetConfig((64, 96, 192, 384, 768), (2, 2, 3, 5, 2)),
    "coatnet_1": CoAtNetConfig((64, 96, 192, 384, 768), (2, 2, 6, 14, 2)),
    "coatnet_2": CoAtNetConfig((128, 128, 256, 512, 1024), (2, 2, 6, 14, 2)),
    "coatnet_3": CoAtNetConfig((192, 192, 384, 768, 1536), (2, 2, 6, 14, 2)),
    "coatnet_4": CoAtNetConfig((192, 192, 384, 768, 1536), (2, 2, 12, 28, 2)),
    "coatnet_5": CoAtNetConfig((192, 256, 512, 1280, 2048), (2, 2, 12, 28, 2), head_dim=64),
    # Our own small ones, for small faces and slow machines.
    "coatnet_micro": CoAtNetConfig((24, 32, 64, 192, 384), (2, 1, 2, 4, 1)),
    "coatnet_atto": CoAtNetConfig((16, 24, 48, 64, 128), (1, 1, 2, 2, 1)),
}

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
dense_init = nn.initializers.xavier_uniform()
# Fewer equal blocks are compiled sooner one by one than stacked, sliced and put back.
SCANNED = 3


class CoAtNet(nn.Module):
    """The backbone: images to pooled, layer-normed features.

    Attributes:
      config: widths and depths, one of `VARIANTS` or your own.
      drop_path: the rate of the last block; the first has 0 and the others lie between, linearly.
        Training with it needs an rng named 'dropout'.
      dtype: of the computation, 'float32' or 'bfloat16'. Parameters, normalisation statistics,
        softmax and features are float32 in either.
      remat: recompute each block in the backward pass, for memory.
      scan: run the equal blocks of a stage, from three on, as a loop over their stacked weights,
        which are saved apart as ever: one block is compiled for all. XLA's CPU compiler shares
        equal blocks anyway and is no faster for it. Drop path draws other random numbers.
      attention: 'xla' or 'cudnn' (NVIDIA GPUs: bfloat16, and an even number of tokens).
      frozen_below: the stages below this one (the stem is stage 0) run as in evaluation even while
        training: running BatchNorm statistics, which stay as they are, and no drop path. For
        stages whose parameters are frozen; 5 is the whole backbone.
    """

    config: CoAtNetConfig
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False
    attention: str = "xla"
    frozen_below: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, return_map: bool = False
    ) -> Float[Array, "b d"] | tuple[Float[Array, "b d"], Float[Array, "b h32 w32 d"]]:
        """Returns float32 features [b, D]: the mean of the last feature map, layer-normed.

        With `return_map` also that map, float32 [b, ceil(h/32), ceil(w/32), D], as the second.

        Any height and width of at least 32 will do. Raises ValueError for anything else and for
        parameters that were made for another image size (see `adapt_relative_bias`).
        """
        check_images(images, self.dtype, model="CoAtNet", smallest=SMALLEST_IMAGE)
        config, dtype = self.config, jnp.dtype(self.dtype)
        rates = np.split(
            np.linspace(0.0, self.drop_path, sum(config.depths[1:])), np.cumsum(config.depths[1:4])
        )
        stem, conv, attention, pool = config.parts()
        attention = functools.partial(attention, implementation=self.attention)

        x = images.astype(dtype)
        x = stem(dtype=dtype, name="stem")(x, train and self.frozen_below == 0)
        for stage in (1, 2, 3, 4):
            block = conv if stage <= 2 else attention
            block = functools.partial(block, config.widths[stage], dtype=dtype)
            training = train and stage >= self.frozen_below
            first, *others = zip(
                [f"stage{stage}_block{n}" for n in range(config.depths[stage])],
                rates[stage - 1].tolist(),
                strict=True,
            )
            x = self._run_block(functools.partial(block, stride=2), first, x, training)
            block = functools.partial(block, stride=1)
            if self.scan and len(others) >= SCANNED and not self.is_initializing():
                x = self._scan_blocks(block, others, x, training)
                continue
            for name_and_rate in others:
                x = self._run_block(block, name_and_rate, x, training)

        x = x.astype(jnp.float32)
        features = pool(x, train and self.frozen_below <= 4)
        return (features, x) if return_map else features

    def _run_block(self, block, name_and_rate, x, train):
        name, rate = name_and_rate
        module = block(drop_path=rate, name=name)
        if self.remat:
            return nn.remat(type(module).__call__, static_argnums=(2,))(module, x, train)
        return module(x, train)

    def _scan_blocks(self, block, names_and_rates, x, train):
        """Runs equal blocks as a loop over their stacked variables; each keeps its own name."""
        names, rates = zip(*names_and_rates, strict=True)
        dropping = train and rates[-1] > 0
        rng = self.make_rng("dropout") if dropping else jax.random.key(0)

        def body(x, this):
            variables, rate, n = this
            # Without drop path the rate stays a Python zero, which asks for no random numbers.
            module = block(drop_path=rate if dropping else 0.0, parent=None)
            rngs = {"dropout": jax.random.fold_in(rng, n)}
            x, new = module.apply(variables, x, train, mutable=["batch_stats"], rngs=rngs)
            return x, new

        trees = [
            {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
            for name in names
        ]
        stacked = _stack(trees)
        body = jax.checkpoint(body) if self.remat else body
        x, new = lax.scan(body, x, (stacked, jnp.asarray(rates), jnp.arange(len(names))))
        if self.is_mutable_collection("batch_stats") and "batch_stats" in new:
            for name, statistics in zip(names, _unstack(new["batch_stats"]), strict=True):
                self.put_variable("batch_stats", name, statistics)
        return x


@jax.custom_vjp
def _stack(trees):
    """One tree of the leaves of several, stacked along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree):
    """The trees that `_stack` has made one of.

    Their places are numbers that XLA does not see through. One that it knows is made a part of
    every kernel that reads the slice, AdamW's for each weight among them, and those of equal blocks
    are compiled apart then: coatnet_1 in scanned blocks took a quarter longer on a CPU.
    """

    def part(place):
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, keepdims=False), tree)

    count = len(jax.tree.leaves(tree)[0])
    # XLA merges a number with its readers, but no maximum. One without a sign cannot mean a place
    # from the end, which saves three operations for each leaf.
    twice = [jnp.full(2, n, jnp.uint32) for n in range(count)]
    return [part(jnp.max(lax.optimization_barrier(numbers))) for numbers in twice]


_stack.defvjp(lambda trees: (_stack(trees), None), lambda _, tree: (_unstack(tree),))


def normed_mean(x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b c"]:
    """The mean over all places, then LayerNorm; called inside a module, which gets its `norm`."""
    return nn.LayerNorm(epsilon=1e-6, name="norm")(x.mean((1, 2)))


def check_images(images: jax.Array, dtype: str, *, model: str, smallest: int) -> None:
    """Raises ValueError in one line for images or a dtype that `model` cannot work with."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', not {dtype!r}")
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{model} takes float images [b, h, w, channels], not {images.dtype}{images.shape}"
        )
    _, h, w, _ = images.shape
    if min(h, w) < smallest:
        raise ValueError(
            f"an image of {h}x{w} is too small: {model} needs at least {smallest}x{smallest}"
        )


class Stem(nn.Module):
    """3x3 convolutions, the first at stride 2, with BN and GELU between them."""

    width: int
    depth: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        for n in range(self.depth):
            if n > 0:
                x = BatchNorm(gelu=True, name=f"norm{n}")(x, train)
            x = Conv3x3(
                self.width,
                stride=2 if n == 0 else 1,
                dtype=self.dtype,
                kernel_init=conv_init,
                name=f"conv{n + 1}",
            )(x)
        return x


class MBConv(nn.Module):
    """Pre-norm inverted bottleneck with squeeze-and-excitation; expands on its own width."""

    width: int
    stride: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        inner = EXPANSION * self.width
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=conv_init)

        shortcut = pool2x2(x) if self.stride == 2 else x
        if x.shape[-1] != self.width:
            shortcut = dense(self.width, name="shortcut")(shortcut)

        x = BatchNorm(name="pre_norm")(x, train)
        x = dense(inner, use_bias=False, name="expand")(x)
        x = BatchNorm(gelu=True, name="norm1")(x, train)
        x = DepthwiseConv(self.stride, dtype=self.dtype, name="depthwise")(x)
        x = BatchNorm(gelu=True, name="norm2")(x, train)
        x = SqueezeExcite(self.width // 4, dtype=self.dtype, name="se")(x)
        x = dense(self.width, name="project")(x)
        return shortcut + DropPath(self.drop_path)(x, train)


class DepthwiseConv(nn.Module):
    """Depthwise convolution without bias, its kernel `side` x `side`; see `depthwise.py`."""

    stride: int
    dtype: jnp.dtype
    side: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        taps = self.side**2  # the fan-out of one channel
        init = nn.initializers.normal(np.sqrt(2 / taps))
        kernel = self.param("kernel", init, (self.side, self.side, x.shape[-1]))
        return depthwise_conv(x, kernel.astype(self.dtype), stride=self.stride)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the means of all channels."""

    hidden: int
    dtype: jnp.dtype
    activation: Callable = nn.silu

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=conv_init)
        gate = x.mean((1, 2), keepdims=True)
        gate = self.activation(dense(self.hidden, name="reduce")(gate))
        return x * nn.sigmoid(dense(c, name="expand")(gate))


class Transformer(nn.Module):
    """Pre-norm relative attention, then a feed-forward layer; a stride-2 one pools first."""

    width: int
    stride: int
    drop_path: float
    dtype: jnp.dtype
    head_dim: int
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=dense_init)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

        shortcut, y = x, norm(name="norm1")(x)
        if self.stride == 2:
            shortcut, y = pool2x2(x), pool2x2(y)
        if x.shape[-1] != self.width:
            shortcut = dense(self.width, name="shortcut")(shortcut)
        y = RelativeAttention(
            self.width, self.head_dim, self.dtype, self.implementation, name="attention"
        )(y)
        x = shortcut + DropPath(self.drop_path)(y, train)

        y = dense(EXPANSION * self.width, name="mlp1")(norm(name="norm2")(x))
        y = dense(self.width, name="mlp2")(gelu(y))
        return x + DropPath(self.drop_path)(y, train)


class RelativeAttention(nn.Module):
    """Global attention with a learned bias for each head and each offset of two tokens.

    Queries, keys and values are `inner` wide, of as many channels as the result unless given.
    """

    width: int
    head_dim: int
    dtype: jnp.dtype
    implementation: str = "xla"
    inner: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        b, h, w, _ = x.shape
        inner = self.inner or self.width
        heads = inner // self.head_dim
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=dense_init)
        table = self._table(h, w, heads)

        qkv = dense(3 * inner, name="qkv")(x).reshape(b, h * w, 3, heads, self.head_dim)
        q, k, v = (qkv[:, :, n] for n in range(3))
        y = attend(q, k, v, relative_bias(table, (h, w)), implementation=self.implementation)
        return dense(self.width, name="out")(y.reshape(b, h, w, inner))

    def _table(self, h, w, heads):
        self._check_table(h, w)
        shape = ((2 * h - 1) * (2 * w - 1), heads)
        return self.param("relative_bias", nn.initializers.normal(0.02), shape)

    def _check_table(self, h, w):
        if not self.has_variable("params", "relative_bias"):
            return
        entries, needed = (
            self.get_variable("params", "relative_bias").shape[0],
            (2 * h - 1) * (2 * w - 1),
        )
        if entries != needed:
            raise ValueError(
                f"{'/'.join(self.path)}: these weights hold {entries} relative positions, but "
                f"this image size gives {h}x{w} tokens, which need {needed}; resize the tables "
                "with adapt_relative_bias or use the image size they were trained at"
            )


def attend(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    bias: Float[Array, "n q k"],
    *,
    implementation: str,
) -> Float[Array, "b q n d"]:
    """Attention of n heads with a bias on the logits; the softmax is float32, the result q's dtype.

    Raises ValueError for an implementation but 'xla' and 'cudnn', and where cudnn cannot be used.
    """
    if implementation == "cudnn":
        _check_cudnn(q)
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias[None].astype(q.dtype), implementation="cudnn"
        )
    if implementation != "xla":
        raise ValueError(f"attention must be 'xla' or 'cudnn', not {implementation!r}")
    # Heads before tokens: a CPU's products would read and write them in strides otherwise.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    logits = jnp.einsum("bnqd,bnkd->bnqk", q, k)
    weights = jax.nn.softmax(add_to_each(logits.astype(jnp.float32), bias)).astype(q.dtype)
    return jnp.swapaxes(jnp.einsum("bnqk,bnkd->bnqd", weights, v), 1, 2)


def _check_cudnn(q):
    if jax.default_backend() != "gpu" or q.dtype != jnp.bfloat16 or q.shape[1] % 2:
        raise ValueError(
            "attention 'cudnn' needs an NVIDIA GPU, bfloat16 and an even number of tokens in every "
            f"stage, but here are {jax.default_backend()}, {q.dtype} and {q.shape[1]} tokens; use "
            "attention 'xla', the word bf16 or another image size"
        )


class DropPath(nn.Module):
    """Drops the whole branch of some images while training (stochastic depth)."""

    rate: float | jax.Array

    @nn.compact
    def __call__(self, x: Float[Array, "b *rest"], train: bool) -> Float[Array, "b *rest"]:
        if not train or (isinstance(self.rate, float) and self.rate == 0):
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)


def _as_one_product(x, kernel, *_, **__):
    y = product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Dense):
    """Flax's Dense over the last axis, as one product of two matrices.

    With more than two axes XLA would copy both operands of the weight gradient, transposed, and
    on a CPU that takes ten times as long as the product.
    """

    dot_general: Callable = _as_one_product


def pool2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Means of 2x2 pixels; with an odd size the last row or column has means of what is there.

    That makes ceil(h/2) rows, as many as the stride-2 convolution of the other branch.
    """
    b, h, w, c = x.shape
    # The mean of an edge pixel and its copy is the pixel.
    x = jnp.concatenate([x, x[:, -1:]], axis=1) if h % 2 else x
    x = jnp.concatenate([x, x[:, :, -1:]], axis=2) if w % 2 else x
    return x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).mean((2, 4))


def relative_bias(
    table: Float[Array, "offsets n"], hw: tuple[int, int]
) -> Float[Array, "n tokens tokens"]:
    """Spreads a table of offsets over all pairs (query, key) of the h x w tokens.

    Offset (qi - ki, qj - kj) is row (qi - ki + h - 1)(2w - 1) + (qj - kj + w - 1) of the table.
    Two products with 0/1 matrices: their gradient is two products again, not a scatter.
    """
    h, w = hw
    rows, columns = _offset_one_hot(h), _offset_one_hot(w)
    grid = table.reshape(2 * h - 1, 2 * w - 1, -1)
    grid = jnp.einsum("ikr,rcn->ikcn", rows, grid, precision="highest")
    bias = jnp.einsum("jlc,ikcn->nijkl", columns, grid, precision="highest")
    return bias.reshape(-1, h * w, h * w)


def _offset_one_hot(n):
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    return np.eye(2 * n - 1, dtype=np.float32)[q - k + n - 1]


def resize_relative_bias(
    table: Float[Array, "offsets n"], old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> Float[Array, "offsets2 n"]:
    """Resizes a relative bias table from old to new numbers of tokens, bilinearly in 2-D.

    The outermost offsets stay the outermost (corners are aligned), so offset 0 stays offset 0.
    Raises ValueError when the table does not belong to `old_hw`.
    """
    (h, w), (new_h, new_w) = old_hw, new_hw
    if table.shape[0] != (2 * h - 1) * (2 * w - 1):
        raise ValueError(
            f"a relative bias table of {table.shape[0]} rows is not one of {h}x{w} tokens, "
            f"which has {(2 * h - 1) * (2 * w - 1)}"
        )
    rows = _interpolation(2 * h - 1, 2 * new_h - 1)
    columns = _interpolation(2 * w - 1, 2 * new_w - 1)
    grid = table.reshape(2 * h - 1, 2 * w - 1, -1)
    grid = jnp.einsum("Rr,Cc,rcn->RCn", rows, columns, grid, precision="highest")
    return grid.reshape(-1, table.shape[1])


def _interpolation(old, new):
    """Matrix [new, old] that interpolates linearly between `old` points, corners aligned."""
    at = np.linspace(0, old - 1, new) if new > 1 else np.array([(old - 1) / 2])
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)


def adapt_relative_bias(
    params: dict,
    like: dict,
    *,
    old_size: tuple[int, int] | None = None,
    new_size: tuple[int, int] | None = None,
) -> dict:
    """Returns `params` with every relative bias table resized to the shape it has in `like`.

    Both are nested dicts of one architecture, `like` of arrays or shapes (`jax.eval_shape`) made
    at the new image size; anything else is returned as it came. Sizes are heights and widths of
    the images in pixels; one that is not given is taken to be square. Raises ValueError where the
    numbers of heads differ, or a table is not one of its size, or of a square where none is given.
    """

    def adapt(tree, like, path):
        if not isinstance(tree, dict) or not isinstance(like, dict):
            return tree
        adapted = {key: adapt(tree[key], like.get(key), (*path, key)) for key in tree}
        old, new = tree.get("relative_bias"), like.get("relative_bias")
        if old is None or new is None or (old.shape == new.shape and old_size == new_size):
            return adapted
        name = "/".join((*path, "relative_bias"))
        if old.shape[1] != new.shape[1]:
            raise ValueError(f"{name} has {old.shape[1]} heads, the model has {new.shape[1]}")
        old_hw = _tokens(old.shape[0], name, old_size)
        new_hw = _tokens(new.shape[0], name, new_size)
        return {**adapted, "relative_bias": resize_relative_bias(old, old_hw, new_hw)}

    return adapt(params, like, ())


def _tokens(entries, name, size):
    """Rows and columns of tokens behind a table, from the image size or as a square."""
    if size is None:
        side = round(entries**0.5)
        h = w = (side + 1) // 2
    else:
        stage = int(re.search(r"stage(\d)", name)[1])
        h, w = (-(-pixels // 2 ** (stage + 1)) for pixels in size)
    if entries != (2 * h - 1) * (2 * w - 1):
        shape = "square image" if size is None else f"image of {size[0]}x{size[1]}"
        raise ValueError(f"{name} has {entries} rows, which is no {shape}: give the sizes of both")
    return h, w
