"""SimCLR (arXiv 2002.05709): find the other view of an image among all views of the batch."""

from dataclasses import dataclass

from coatnet_jax.ssl.method import Method
from coatnet_jax.ssl.nt_xent import nt_xent


@dataclass(frozen=True)
class SimCLR(Method):
    """NT-Xent on the projections; the fields are options of `nt_xent`."""

    temperature: float = 0.2
    decoupled: bool = False
    chunk: int = 0

    def loss(self, online, target, *, age, memory):
        """See `Method.loss`."""
        loss, metrics = nt_xent(
            online["z"],
            temperature=self.temperature,
            decoupled=self.decoupled,
            chunk=self.chunk,
        )
        return loss, metrics, memory
