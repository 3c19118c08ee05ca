"""Any pictures of faces as a TFDS dataset: in folders named by age, or in another layout.

AFAD, CACD, All-Age-Faces, APPA-REAL and label tables are read by giving their `Reading`
(see `layouts`). Images keep their original bytes.
"""

from input_pipeline.face_builder import FaceBuilder


class Builder(FaceBuilder):
    """Reads `[age]/any name.jpg` unless told otherwise."""

    LAYOUT = "folder"
    DESCRIPTION = "Faces with ages."
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put folders named by age (25/any.jpg), or an archive of them, into the manual folder."
    )
