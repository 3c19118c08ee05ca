"""Colours, and the names of the groups that they stand for.

Those of groups are from the set of Okabe and Ito (2008), which people with a colour vision
deficiency can tell apart.
"""

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#B4B8BD"
INK, MUTED, GRID, PANEL = "#1F2430", "#667080", "#E3E6EA", "#F7F8FA"

CLASS_COLOURS = (SKY, BLUE, ORANGE, RED)
GENDER_NAMES, GENDER_COLOURS = ("male", "female"), (BLUE, ORANGE)
RACE_NAMES = ("White", "Black", "Asian", "Indian", "Other")
RACE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY)
