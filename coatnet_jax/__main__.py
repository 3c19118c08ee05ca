"""The program `coatnet-jax`, which is `python -m coatnet_jax` too."""

from coatnet_jax.allocator import restart_with_thread_caches


def run() -> None:
    """`main.main` in a process that was begun with the allocator's settings for compiling."""
    restart_with_thread_caches()
    from coatnet_jax.main import main  # not before: what is imported now is imported once more

    main()


if __name__ == "__main__":
    run()
