"""What may be done with a result: terms of its data, limits, uses to stay away from."""

import ml_collections

DRAWN = (
    "**The faces are drawn by this program, not photos of people.** The figures show that every "
    "stage works; they say nothing of how well ages of real faces are estimated."
)
UTKFACE = (
    "The faces are of UTKFace, which its authors give for non-commercial research only; the "
    "pictures may not be passed on. What was trained on them falls under the same terms."
)
OTHER = "What was trained here falls under the terms of the data that it was trained on."
OTHER_LIMITS = (
    "Ages are as the data set gives them, and may be wrong. Look at how many faces each age class "
    "has and how the error differs between them; other pictures than those trained on (another "
    "crop, camera, age or group of people) are out of its range."
)
LIMITS = (
    "UTKFace's ages are estimates, made by an algorithm and checked by people, and some are wrong "
    "by decades. Ages 18-40 and White faces are the largest groups; children, the old and other "
    "groups are fewer, and errors differ between them. Training saw aligned, frontal crops: "
    "anything else is out of its range."
)
LOCAL = "This page holds pictures of faces: it is meant for this machine, so do not publish it."
DISCOURAGED = (
    "It is for research and for learning. Do not use it to decide anything about a person: access, "
    "eligibility, employment, police or border work, advertising, or whether somebody is a child."
)


def data_terms(name: str) -> str:
    """The sentence that stands beside any result on the data set of this name."""
    if name.startswith("drawn"):
        return DRAWN
    return UTKFACE if name == "utkface" else OTHER


def training_split(name: str, splits: str) -> str:
    """What was trained on, in words: the data set, and its table of splits if not `default`."""
    table = "" if splits == "default" else f" (table of splits `{splits}`)"
    return f"the training split of `{name}`{table}"


def model_card(config: ml_collections.ConfigDict, *, parameters: int, fingerprint: str) -> str:
    """Markdown that lies beside the checkpoints of a run: what it is, terms, limits, use."""
    name = config.data.name
    limits = LIMITS if name == "utkface" else OTHER_LIMITS
    if name.startswith("drawn"):
        limits = "None of it holds for real faces."
    start = config.init_from or "random weights"
    if teachers := config.get("distill", {}).get("teachers"):
        start += f", taught by {teachers}"
    return "\n\n".join(
        [
            f"# {config.model.name}, {config.stage}",
            f"{parameters / 1e6:.2f} M parameters, {config.model.image_size} px, from {start}. "
            f"Trained on {training_split(name, config.data.splits)}, fingerprint "
            f"`{fingerprint[:16]}`; config.json and run.json beside this file say how, evaluate/ "
            "how well, by age class.",
            "## Terms",
            data_terms(name),
            "## Limits",
            limits,
            "## Use",
            DISCOURAGED + "\n",
        ]
    )
