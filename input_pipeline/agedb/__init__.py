"""TFDS builder of AgeDB (Moschoglou et al., CVPR Workshops 2017)."""
