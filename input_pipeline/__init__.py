"""Data side of coatnet-jax: from a downloaded archive to batches of uint8 face images."""
