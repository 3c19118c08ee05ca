"""UTKFace as a TFDS dataset: aligned crops, or the photos they were cut from.

UTKFace: Zhang, Song and Qi, "Age Progression/Regression by Conditional Adversarial Autoencoder",
CVPR 2017, arXiv 1702.08423. Images keep their original bytes.
"""

from input_pipeline.face_builder import FaceBuilder


class Builder(FaceBuilder):
    """Reads `[age]_[gender]_[race]_[date&time].jpg`, with or without `.chip.jpg`."""

    LAYOUT = "utkface"
    HOMEPAGE = "https://susanqq.github.io/UTKFace/"
    DESCRIPTION = "Faces with age, gender and race in the file name."
    CITATION = """@inproceedings{zhang2017age,
  title={Age Progression/Regression by Conditional Adversarial Autoencoder},
  author={Zhang, Zhifei and Song, Yang and Qi, Hairong},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2017}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the UTKFace download (a zip, tars, or the folder UTKFace) into the manual folder. "
        "It is given out at https://susanqq.github.io/UTKFace/ for non-commercial research only."
    )
