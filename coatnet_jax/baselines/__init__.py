"""The models that people compare CoAtNet with, each with CoAtNet's interface.

A module of this package takes float images [b, h, w, 3] with `train` and `return_map`, returns
float32 features [b, D], and has the attributes `drop_path`, `dtype`, `frozen_below` and, but for
`SimpleCNN`, `remat`, which mean what they mean in `CoAtNet`. Its parameters lie in `stem`,
`stage1_block0`, ... and a last `norm`, as layer-wise rates and frozen stages need it: there are
four stages everywhere. Epsilons, padding and order are torchvision's and timm's, so that their
weights give their features.
"""
