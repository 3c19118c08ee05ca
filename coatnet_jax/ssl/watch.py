"""What tells whether features spread out or collapse, without labels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coatnet_jax.ssl.nt_xent import unit_length

ROWS = 256  # views that `alignment_and_uniformity` looks at


def alignment_and_uniformity(z: Float[Array, "2b d"]) -> dict[str, Float[Array, ""]]:
    """Of unit-length projections (arXiv 2005.10242), over at most the first 128 images of a batch.

    `alignment` is the mean squared distance of two views of an image: 0 where they agree, 2 at
    random. `uniformity` is log mean exp(-2 distance^2) over the pairs of images, of either view:
    near -4 for points all over the sphere, 0 where all are one point.
    """
    first, second = jnp.split(unit_length(z), 2)
    first, second = first[: ROWS // 2], second[: ROWS // 2]
    alignment = jnp.mean(jnp.sum((first - second) ** 2, axis=-1))
    pairs = np.triu_indices(len(first), k=1)

    def uniformity(z):
        return jnp.log(jnp.mean(jnp.exp(-2 * jnp.maximum(2 - 2 * (z @ z.T), 0))[pairs]))

    return {"alignment": alignment, "uniformity": (uniformity(first) + uniformity(second)) / 2}


def rank_me(z: Float[np.ndarray, "n d"]) -> float:
    """The effective number of dimensions of features, RankMe (arXiv 2210.02885, equation 1).

    The exponential of the entropy of the singular values: 1 where all rows lie on one line, at most
    min(n, d).
    """
    values = np.linalg.svd(np.asarray(z, np.float64), compute_uv=False)
    p = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def spread(z: Float[np.ndarray, "n d"]) -> float:
    """Standard deviation of unit-length features, mean over dimensions, times the root of d.

    Near 1 where the directions fill the sphere, 0 where all rows got the same (SimSiam, arXiv
    2011.10566, figure 2).
    """
    z = np.asarray(z, np.float64)
    z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    return float(z.std(axis=0).mean() * np.sqrt(z.shape[1]))


def collapse_warning(*, embedding_std: float, rank_me: float) -> str:
    """One sentence where the features have collapsed or are about to; '' where they have not."""
    if embedding_std < 0.02:
        return (
            f"the features have collapsed to one point (embedding_std {embedding_std:.3f}, healthy "
            "above 0.1): lower the learning rate, or look at the method's momentum and heads"
        )
    if rank_me < 2:
        return (
            f"the features have collapsed to a line (RankMe {rank_me:.1f} dimensions): lower the "
            "learning rate, or raise the weight of the terms that decorrelate"
        )
    if embedding_std < 0.1 or rank_me < 5:
        return (
            f"the features are narrow (embedding_std {embedding_std:.3f}, RankMe {rank_me:.1f} "
            "dimensions): usual at the start, a coming collapse if it goes on"
        )
    return ""
