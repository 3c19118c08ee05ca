"""Settings of a process that computes with JAX, the same for commands and benchmarks."""

from coatnet_jax.allocator import keep_freed_memory
from coatnet_jax.xla_flags import use_cublas


def set_up() -> None:
    """Memory that is kept on the CPU, and on NVIDIA GPUs products by cuBLAS.

    To be called before JAX looks for its devices, and best before it is imported
    (`keep_freed_memory`).
    """
    keep_freed_memory()
    use_cublas()
