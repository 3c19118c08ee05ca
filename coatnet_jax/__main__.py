"""`python -m coatnet_jax` is the program `coatnet-jax`."""

from coatnet_jax.main import main

if __name__ == "__main__":
    main()
