"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), small as in DeiT (2012.12877).

As timm's `vit_small_patch16_224`: learned positions, a class token whose last state is the
feature. The twelve layers are counted as four stages of three, so that 'stage3' means the second
half of the network as it does in the others.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coatnet_jax.batchnorm import gelu
from coatnet_jax.coatnet import Dense, DropPath, check_images

PATCH = 16
STAGES = 4

dense_init = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Width of a token, heads of an attention layer, and layers, which are divided by four."""

    width: int
    heads: int
    depth: int = 12


VARIANTS = {"vit_s16": ViTConfig(width=384, heads=6)}


class ViT(nn.Module):
    """Images to the layer-normed class token; attributes as in `CoAtNet`."""

    config: ViTConfig
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    frozen_below: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, return_map: bool = False
    ) -> Float[Array, "b d"] | tuple[Float[Array, "b d"], Float[Array, "b h16 w16 d"]]:
        """Returns float32 features [b, D]: the last state of the class token, layer-normed.

        With `return_map` also the other tokens, layer-normed too, as a grid [b, h/16, w/16, D].

        Height and width have to be multiples of 16. Raises ValueError for anything else and for
        parameters that were made for another image size (see `adapt_positions`).
        """
        config, dtype = self.config, jnp.dtype(self.dtype)
        check_images(images, self.dtype, model="ViT", smallest=PATCH)
        _check_patches(images)
        b, h, w, _ = images.shape
        rates = np.linspace(0.0, self.drop_path, config.depth).tolist()
        layer = nn.remat(Layer, static_argnums=(2,)) if self.remat else Layer

        x = Stem(config.width, dtype, name="stem")(images.astype(dtype))
        for n, rate in enumerate(rates):
            stage, block = divmod(n, config.depth // STAGES)
            x = layer(config, drop_path=rate, dtype=dtype, name=f"stage{stage + 1}_block{block}")(
                x, train and stage + 1 >= self.frozen_below
            )

        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x.astype(jnp.float32))
        features, grid = x[:, 0], x[:, 1:].reshape(b, h // PATCH, w // PATCH, -1)
        return (features, grid) if return_map else features


def _check_patches(images):
    _, h, w, _ = images.shape
    if h % PATCH or w % PATCH:
        near = [max(1, round(side / PATCH)) * PATCH for side in (h, w)]
        raise ValueError(
            f"ViT cuts images into patches of {PATCH}x{PATCH}, and {h}x{w} is no multiple of that; "
            f"give it images of {near[0]}x{near[1]}"
        )


class Stem(nn.Module):
    """Patches as tokens, a class token before them, and the positions of all."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b tokens d"]:
        b, h, w, c = images.shape
        rows, columns = h // PATCH, w // PATCH
        patches = images.reshape(b, rows, PATCH, columns, PATCH, c).swapaxes(2, 3)
        x = Dense(self.width, dtype=self.dtype, name="patches")(
            patches.reshape(b, rows * columns, PATCH * PATCH * c)
        )
        token = self.param("class_token", nn.initializers.normal(1e-6), (self.width,))
        self._check_positions(rows, columns)
        shape = (1 + rows * columns, self.width)
        positions = self.param("position_embedding", dense_init, shape)
        token = jnp.broadcast_to(token.astype(self.dtype), (b, 1, self.width))
        return jnp.concatenate([token, x], axis=1) + positions.astype(self.dtype)

    def _check_positions(self, rows, columns):
        if not self.has_variable("params", "position_embedding"):
            return
        held = self.get_variable("params", "position_embedding").shape[0] - 1
        if held != rows * columns:
            raise ValueError(
                f"these weights hold positions of {held} patches, but this image size gives "
                f"{rows}x{columns}; resize them with adapt_positions or use the image size they "
                "were trained at"
            )


class Layer(nn.Module):
    """Pre-norm attention, then a feed-forward layer of four times the width."""

    config: ViTConfig
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b tokens d"], train: bool) -> Float[Array, "b tokens d"]:
        width = self.config.width
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=dense_init)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        attention = Attention(self.config, self.dtype, name="attention")

        x = x + DropPath(self.drop_path)(attention(norm(name="norm1")(x)), train)
        y = dense(4 * width, name="mlp1")(norm(name="norm2")(x))
        y = dense(width, name="mlp2")(gelu(y))
        return x + DropPath(self.drop_path)(y, train)


class Attention(nn.Module):
    """Every token looks at every token; softmax in float32."""

    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b tokens d"]) -> Float[Array, "b tokens d"]:
        b, tokens, width = x.shape
        heads = self.config.heads
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=dense_init)
        qkv = dense(3 * width, name="qkv")(x).reshape(b, tokens, 3, heads, width // heads)
        q, k, v = (qkv[:, :, n] for n in range(3))
        logits = jnp.einsum("bqnd,bknd->bnqk", q * (width // heads) ** -0.5, k)
        weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(self.dtype)
        y = jnp.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, tokens, width)
        return dense(width, name="out")(y)


def adapt_positions(params: dict, like: dict) -> dict:
    """Returns a ViT's `params` with the positions resized to the number they have in `like`.

    Bilinear between the centres of the patches, the class token's own position as it is. Both are
    parameters of one architecture for square images; those of another come back as they are.
    Raises ValueError where a number of patches is not a square's.
    """
    old, new = (tree.get("stem", {}).get("position_embedding") for tree in (params, like))
    if old is None or new is None or old.shape == new.shape:
        return params
    sides = [_square_side(table.shape[0] - 1) for table in (old, new)]
    width = old.shape[1]
    grid = jnp.asarray(old[1:]).reshape(sides[0], sides[0], width)
    grid = jax.image.resize(grid, (sides[1], sides[1], width), "bilinear", precision="highest")
    table = jnp.concatenate([jnp.asarray(old[:1]), grid.reshape(-1, width)])
    return {**params, "stem": {**params["stem"], "position_embedding": table}}


def _square_side(patches):
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"stem/position_embedding has {patches} patches, which is no square image")
    return side
