"""NT-Xent, the contrastive loss of SimCLR: all pairs at once, or in chunks of linear memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def nt_xent(
    z: Float[Array, "2b d"], *, temperature: float, decoupled: bool = False, chunk: int = 0
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The normalised temperature-scaled cross-entropy of two views, SimCLR (arXiv 2002.05709).

    Rows i and i + b are the two views of one image; every other row is a negative. Under `jax.jit`
    over global arrays this is the loss over the global batch. Computed in float32.

    Args:
      z: projections of any length; they are L2-normalised here.
      temperature: divides the cosine similarities.
      decoupled: leave the positive out of the denominator (DCL, arXiv 2110.06848).
      chunk: rows whose similarities are held at a time. Memory is [chunk, 2b]; 0 takes all rows,
        [2b, 2b]. Loss and gradients are the same; the backward pass computes the similarities anew.

    Returns:
      The mean loss, and `contrastive_top1`: how often a row's most similar row is its other view.

    Raises:
      ValueError: for an odd number of rows, fewer than two images, or a chunk that does not divide
        the rows.
    """
    rows = z.shape[0]
    if rows % 2 or rows < 4:
        raise ValueError(f"nt_xent needs two views of at least 2 images, z has {rows} rows")
    if chunk < 0 or (chunk and rows % chunk):
        raise ValueError(
            f"loss.chunk {chunk} does not divide the {rows} rows of two views of {rows // 2} images"
        )
    z = unit_length(z)
    place = jnp.arange(rows)

    def of_rows(part):
        anchor, other_view, place = part
        partner = (place + rows // 2) % rows
        similarity = jnp.matmul(anchor, z.T, precision=jax.lax.Precision.HIGHEST)
        similarity = jnp.where(place[:, None] == jnp.arange(rows), -jnp.inf, similarity)
        logits = similarity / temperature
        if decoupled:
            logits = jnp.where(partner[:, None] == jnp.arange(rows), -jnp.inf, logits)
        positive = jnp.sum(anchor * other_view, axis=-1) / temperature
        found = jnp.argmax(similarity, axis=-1) == partner
        return jax.nn.logsumexp(logits, axis=-1) - positive, found

    parts = (z, jnp.roll(z, rows // 2, axis=0), place)
    if chunk:
        # A chunk takes every n-th row, so that each device has its share of every chunk.
        parts = jax.tree.map(
            lambda x: x.reshape(chunk, rows // chunk, *x.shape[1:]).swapaxes(0, 1), parts
        )
        losses, found = jax.lax.map(jax.checkpoint(of_rows), parts)
    else:
        losses, found = of_rows(parts)
    return jnp.mean(losses), {"contrastive_top1": jnp.mean(found)}


def unit_length(z: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows of length one in float32; a row of zeros stays one, with finite gradients."""
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))
