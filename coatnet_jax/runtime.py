"""Settings of a process that computes with JAX, the same for commands and benchmarks."""

from coatnet_jax.allocator import keep_freed_memory
from coatnet_jax.xla_flags import keep_loops_rolled, use_cublas


def set_up() -> None:
    """On the CPU memory that is kept and loops that stay rolled, on NVIDIA GPUs products by cuBLAS.

    To be called before JAX looks for its devices, and best before it is imported
    (`keep_freed_memory`).
    """
    keep_freed_memory()
    keep_loops_rolled()
    use_cublas()
