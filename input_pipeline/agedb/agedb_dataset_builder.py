"""AgeDB as a TFDS dataset.

AgeDB: Moschoglou et al., "AgeDB: the first manually collected, in-the-wild age database", CVPR
Workshops 2017. Images keep their original bytes; the person's name becomes an identity number.
"""

from input_pipeline.face_builder import FaceBuilder


class Builder(FaceBuilder):
    """Reads `[number]_[Name]_[age]_[m|f].jpg`."""

    LAYOUT = "agedb"
    HOMEPAGE = "https://ibug.doc.ic.ac.uk/resources/agedb/"
    DESCRIPTION = "Photos of known people with age, gender and identity in the file name."
    CITATION = """@inproceedings{moschoglou2017agedb,
  title={AgeDB: the first manually collected, in-the-wild age database},
  author={Moschoglou, Stylianos and Papaioannou, Athanasios and Sagonas, Christos and
          Deng, Jiankang and Kotsia, Irene and Zafeiriou, Stefanos},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition Workshops},
  year={2017}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the AgeDB archive, unpacked with its password, or its folder into the manual folder. "
        "Its authors give it out on request, for non-commercial research only."
    )
