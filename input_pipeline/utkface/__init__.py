"""TFDS builder of UTKFace (Zhang, Song and Qi, CVPR 2017, arXiv 1702.08423)."""
