"""TFDS builder of pictures in folders, or with a table of labels."""
