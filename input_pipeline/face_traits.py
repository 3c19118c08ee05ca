"""Who a drawn face is: proportions, skin, hair and signs of age from an age, a gender and a race.

Each sign of age strays by itself, and the whole face looks some years off, so that no single cue
tells the age.
"""

from dataclasses import dataclass

import numpy as np

# Broad, overlapping tendencies by UTKFace's race column; every face strays from them.
SKIN = ((226, 184, 158), (128, 86, 62), (224, 182, 146), (172, 122, 88), (198, 150, 118))
HAIR = (
    ((226, 196, 140), (196, 154, 92), (128, 84, 50), (78, 52, 36), (150, 72, 38)),
    ((34, 26, 24), (52, 38, 32)),
    ((30, 26, 28), (58, 40, 32)),
    ((34, 26, 24), (64, 44, 34)),
    ((44, 32, 28), (92, 62, 42)),
)
IRIS = ((70, 46, 30), (54, 36, 26), (96, 120, 140), (98, 110, 70))


@dataclass(frozen=True)
class Traits:
    """One person. Lengths are in half head heights; signs of age, and others named so, are 0-1."""

    child: float  # 0-1: a baby's proportions are 1, a grown-up's 0
    cheek: float  # half width at the eyes
    jaw: float  # half width at the mouth
    chin: float
    ear: float
    eye_y: float
    eye_gap: float
    eye_size: float
    eye_open: float  # height by width
    eye_tilt: float
    nose: float  # length
    nose_width: float
    mouth_y: float
    mouth_width: float
    lips: float
    brow: float
    smile: float  # -1 to 1
    teeth: bool
    # signs of age
    jowl: float
    droop: float
    forehead: float
    crows_feet: float
    folds: float
    bags: float
    mottle: float
    spots: float
    grey: float
    recede: float
    # the rest
    skin: np.ndarray  # RGB 0-255, as are hair and iris
    hair: np.ndarray
    iris: np.ndarray
    hair_style: str  # fuzz, short, bob, long, bun
    hair_volume: float
    hairline: float  # y of its middle
    curly: bool
    fringe: bool
    beard: str  # none, stubble, moustache, full
    blush: float
    lashes: float
    glasses: bool


def pick_traits(rng: np.random.Generator, age: float, gender: int, race: int) -> Traits:
    """A person of this age in years: every sign follows its own noisy idea of how old they look."""
    looks = max(0.0, age + 3 * min(1, 0.2 + age / 25) * rng.normal())

    def seen(spread: float = 4) -> float:
        return max(0.0, looks + spread * min(1, 0.15 + looks / 30) * rng.normal())

    def child() -> float:
        return 1 - float(np.interp(seen(), (0, 2, 6, 12, 19), (0, 0.2, 0.5, 0.78, 1)))

    def sign(low: float, high: float) -> float:
        return min(1.0, _ramp(seen(), low, high) * max(0.2, 1 + 0.2 * rng.normal()))

    def about(value: float, spread: float) -> float:
        return value + spread * rng.normal()

    young, low, wide, big = child(), child(), child(), child()
    man, old = (gender == 0) * (1 - young), sign(42, 82)
    smile = float(rng.uniform(-0.4, 1))
    hair = np.array(HAIR[race][rng.integers(len(HAIR[race]))]) * about(1, 0.2)
    full_lips = 0.062 + 0.014 * gender + 0.012 * (race == 1)
    return Traits(
        child=young,
        cheek=about(0.73 + 0.14 * wide, 0.025),
        jaw=about(0.55 + 0.05 * man + 0.13 * young, 0.025),
        chin=about(0.25 + 0.08 * man + 0.09 * young, 0.02),
        ear=about(0.16 + 0.09 * sign(40, 85), 0.012),
        eye_y=about(-0.08 + 0.28 * low, 0.025),
        eye_gap=about(0.33 + 0.06 * young, 0.015),
        eye_size=about(0.135 + 0.055 * big - 0.015 * old, 0.008),
        eye_open=about(0.46 + 0.22 * big - 0.12 * sign(38, 78) - 0.06 * (race == 2), 0.04),
        eye_tilt=about(0.015 + 0.02 * (race == 2), 0.015),
        nose=about(0.38 - 0.2 * low + 0.07 * old, 0.02),
        nose_width=about(0.13 + 0.025 * (race == 1) + 0.02 * man + 0.03 * old, 0.01),
        mouth_y=about(0.56 + 0.07 * low, 0.02),
        mouth_width=about(0.27 - 0.09 * young + 0.02 * old, 0.015),
        lips=max(0.016, about(full_lips, 0.008) * (1 - 0.65 * sign(38, 78))),
        brow=max(0.012, about(0.03 + 0.022 * man - 0.012 * young, 0.005)),
        smile=smile,
        teeth=bool(looks > 1 and smile > 0.3 and rng.random() < 0.45),
        jowl=sign(38, 74),
        droop=sign(38, 76),
        forehead=sign(29, 62),
        crows_feet=min(1, sign(29, 62) + 0.12 * max(0, smile)),
        folds=min(1, 0.08 + sign(24, 60) + 0.12 * max(0, smile)),
        bags=sign(27, 66),
        mottle=sign(32, 80),
        spots=sign(45, 85),
        skin=(np.array(SKIN[race]) * about(1, 0.09) + rng.normal(size=3) * 4).astype(np.float32),
        hair=np.clip(hair + rng.normal(size=3) * 3, 8, 250).astype(np.float32),
        iris=np.array(IRIS[rng.integers(2 if race else 4)], np.float32),
        curly=bool(rng.random() < (0.85 if race == 1 else 0.15)),
        blush=float(rng.uniform(0, 0.3)) + 0.25 * young,
        lashes=(gender - 0.5 * young * gender) * float(rng.uniform(0.2, 0.9)),
        glasses=bool(rng.random() < 0.03 + 0.1 * _ramp(looks, 8, 25) + 0.15 * old),
        **_pick_hair(rng, age, seen(), young, gender),
    )


def _pick_hair(rng, age: float, years: float, young: float, gender: int) -> dict:
    """Cut, hairline, grey and beard; `age` is real, `years` is how old the hair looks."""
    odds = ((0.93, 0.07, 0, 0), (0.1 + 0.3 * (years > 55), 0.28, 0.4 - 0.3 * (years > 55), 0.22))
    style = str(rng.choice(["short", "bob", "long", "bun"], p=odds[gender]))
    beards = (0.5, 0.22, 0.1, 0.18) if gender == 0 and age >= 18 else (1, 0, 0, 0)
    onset, dyed = rng.uniform(28, 55), rng.random() < (0.12, 0.35)[gender]
    tendency = rng.beta(1.3, 1.3) if gender == 0 else 0.12 * rng.random()
    return {
        "hair_style": "fuzz" if years < 2.2 else style,
        "hair_volume": float(rng.uniform(0.03, 0.12)) * (1 - 0.4 * _ramp(years, 50, 80)),
        "hairline": -0.56 - 0.02 * young + 0.04 * rng.normal(),
        "recede": tendency * _ramp(years, 22, 62) ** 0.8,
        "grey": _ramp(years, onset, onset + rng.uniform(22, 45)) * (0.15 if dyed else 1),
        "fringe": bool(years > 2 and rng.random() < 0.2 + 0.25 * young),
        "beard": str(rng.choice(["none", "stubble", "moustache", "full"], p=beards)),
    }


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
