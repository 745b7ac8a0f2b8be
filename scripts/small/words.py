"""Names and phrasings: many of each, so that the model learns to read a question and its options, not to know them.

The last name of every list is never trained on, and neither is the last phrasing: both are for the probe of unknown
words (`Words.held_out`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NAMES: dict[str, tuple[str, ...]] = {
    "meningioma": (
        "meningioma",
        "meningeal tumour",
        "tumour of the meninges",
        "Meningeom",
        "méningiome",
        "dural tumour",
    ),
    "glioma": ("glioma", "glial tumour", "tumour of glial cells", "Gliom", "gliome", "astrocytic tumour"),
    "pituitary tumour": (
        "pituitary tumour",
        "pituitary adenoma",
        "tumor of the pituitary gland",
        "Hypophysentumor",
        "adénome hypophysaire",
        "hypophyseal adenoma",
    ),
    "red blood cell": ("red blood cell", "erythrocyte", "RBC", "red cell", "Erythrozyt", "globule rouge"),
    "white blood cell": ("white blood cell", "leukocyte", "WBC", "white cell", "Leukozyt", "leucocyte"),
    "platelet": ("platelet", "thrombocyte", "PLT", "blood platelet", "Thrombozyt", "plaquette"),
    "nucleus": ("nucleus", "cell nucleus", "Zellkern", "noyau", "nuclear body"),
    "optic disc": ("optic disc", "optic nerve head", "optic disk", "papilla", "Papille", "blind spot disc"),
    "hard exudates": ("hard exudates", "exudate", "yellow lipid deposits", "harte Exsudate", "lipid exudation"),
    "haemorrhage": ("haemorrhage", "bleeding", "hemorrhage", "retinal bleed", "Blutung", "hémorragie"),
    "normal cell": ("normal cell", "normal red cell", "normocyte", "discocyte"),
    "spherocyte": ("spherocyte", "sphere-shaped cell", "Sphärozyt", "spherical red cell"),
    "target cell": ("target cell", "codocyte", "Targetzelle", "leptocyte"),
    "stomatocyte": ("stomatocyte", "mouth-shaped cell", "Stomatozyt", "slit-shaped cell"),
    "ovalocyte": ("ovalocyte", "oval cell", "elliptocyte", "Ovalozyt"),
    "schistocyte": ("schistocyte", "red cell fragment", "helmet cell", "Fragmentozyt"),
    "burr cell": ("burr cell", "echinocyte", "crenated cell", "Stechapfelzelle"),
    "hypochromia": ("hypochromia", "hypochromic cell", "pale red cell", "poorly stained cell"),
    "macrocyte": ("macrocyte", "enlarged red cell", "Makrozyt", "oversized cell"),
    "microcyte": ("microcyte", "small red cell", "Mikrozyt", "undersized cell"),
    "teardrop": ("teardrop", "teardrop cell", "dacrocyte", "Tränentropfenzelle"),
    "nothing": ("nothing", "background", "none of these", "no finding", "empty background"),
    "upper left": ("upper left", "top left", "left upper quadrant", "top-left corner", "oben links", "north-west"),
    "upper right": (
        "upper right",
        "top right",
        "right upper quadrant",
        "top-right corner",
        "oben rechts",
        "north-east",
    ),
    "lower left": (
        "lower left",
        "bottom left",
        "left lower quadrant",
        "bottom-left corner",
        "unten links",
        "south-west",
    ),
    "lower right": (
        "lower right",
        "bottom right",
        "right lower quadrant",
        "bottom-right corner",
        "unten rechts",
        "south-east",
    ),
    "left": ("left", "left half", "the left side", "links", "left-hand part"),
    "right": ("right", "right half", "the right side", "rechts", "right-hand part"),
    "upper": ("upper half", "top", "the upper part", "oben", "above the middle"),
    "lower": ("lower half", "bottom", "the lower part", "unten", "below the middle"),
    "yes": ("yes", "Yes, there is", "present", "true", "ja", "it is so"),
    "no": ("no", "No, there is not", "absent", "false", "nein", "it is not so"),
    "one": ("one", "1", "a single one", "exactly one", "eins", "just one"),
    "two": ("two", "2", "a pair", "exactly two", "zwei", "a couple"),
    "three or more": (
        "three or more",
        "3 or more",
        "at least three",
        "more than two",
        "drei oder mehr",
        "several (3+)",
    ),
    "head MR": (
        "MR image of a head",
        "brain MRI",
        "magnetic resonance image of the brain",
        "head MRI slice",
        "cranial MRI",
    ),
    "blood smear": ("blood smear", "stained blood film", "microscope image of blood", "Blutausstrich", "blood film"),
    "cell nuclei": (
        "microscope image of cell nuclei",
        "micrograph of nuclei",
        "tissue or cell culture micrograph",
        "nuclear stain",
    ),
    "eye": ("photograph of the retina", "fundus photograph", "fundus image", "ophthalmoscopic picture"),
    "chest": ("chest X-ray", "radiograph of the chest", "thorax image", "chest radiology image"),
    "abdomen": ("abdominal CT", "CT of the abdomen", "abdominal scan", "abdominal radiology image"),
    "head": ("head scan", "CT or MR of the head", "brain scan", "neuroradiology image"),
}
PAIRED = ("yes", "no", "left", "right", "upper", "lower")  # "yes" does not go with "absent"
PHRASES: dict[str, tuple[str, ...]] = {
    "tumour_type": (
        "What type of tumour is this?",
        "Which tumour is seen in this brain scan?",
        "Name the kind of lesion.",
        "The slice shows a mass. What is it most likely?",
        "Select the correct diagnosis for this MR image.",
        "Which of these neoplasms does the picture show?",
    ),
    "quadrant": (
        "Where is the {thing}?",
        "Which quadrant contains the {thing}?",
        "In what part of the picture is the {thing}?",
        "The {thing} lies in which quarter of the image?",
        "Tell the location of the {thing}.",
        "Point out the quarter with the {thing}.",
    ),
    "tumour_size": (
        "How large is the tumour's box relative to the image?",
        "What share of the picture does the tumour take up?",
        "Estimate the area of the box around the tumour.",
        "Which size class fits the lesion?",
    ),
    "tumour_box": (
        "Which of these boxes surrounds the tumour?",
        "Select the box [x1, y1, x2, y2] that fits the tumour best.",
        "Where is the tumour? Boxes are [x1, y1, x2, y2] in fractions.",
        "Which rectangle contains the lesion?",
    ),
    "at_point": (
        "What is at (x={x}, y={y})?",
        "Which structure lies at ({x}, {y})?",
        "What can be seen at the point ({x}, {y})?",
        "Name what is shown around x={x}, y={y}.",
        "Identify the object located at position ({x}, {y}).",
        "Look at ({x}, {y}). What is it?",
        "The point ({x}, {y}) falls on which object?",
    ),
    "platelet_count": (
        "How many platelets are there?",
        "Count the platelets.",
        "What is the number of platelets in the picture?",
        "Give the platelet number of this field.",
    ),
    "in_region": (
        "Does the region [{box}] contain a {thing}?",
        "Is a {thing} visible in [{box}]?",
        "Look at the window [{box}]. Is there a {thing}?",
        "Any {thing} inside of the area [{box}]?",
    ),
    "on_nucleus": (
        "Is there a nucleus at ({x}, {y})?",
        "Does ({x}, {y}) hit a cell nucleus?",
        "Is the point ({x}, {y}) inside a nucleus?",
        "Would a needle at ({x}, {y}) touch a nucleus?",
    ),
    "nuclei_count": (
        "How many nuclei are there?",
        "Count the nuclei in this picture.",
        "What is the number of nuclei?",
        "Give the number of cells, by their nuclei.",
    ),
    "present": (
        "Is there a {thing} in this image?",
        "Does the image show a {thing}?",
        "Can you see a {thing}?",
        "Is a {thing} present?",
        "Would you report a {thing} here?",
    ),
    "modality": (
        "What kind of image is this?",
        "How was this picture made?",
        "Which type of examination is shown?",
        "What does this image show?",
        "Name the imaging technique.",
    ),
    "side": (
        "Is the {thing} on the left or on the right?",
        "In which half of the image is the {thing}?",
        "On which side does the {thing} lie?",
    ),
    "height": (
        "Is the {thing} in the upper or the lower half?",
        "How high in the image does the {thing} lie?",
        "Does the {thing} lie above or below the middle?",
    ),
    "find": (
        "Where is the {thing}?",
        "Find the {thing}.",
        "Locate every {thing}.",
        "Show the position of the {thing}.",
        "Mark the {thing}.",
    ),
    "middle": (
        "What kind of cell is in the middle?",
        "What is in the centre of the image?",
        "What do you see in the middle?",
        "Name the object at the centre.",
    ),
    "count": (
        "How many {thing}s are there?",
        "Count the {thing}s.",
        "What is the number of {thing}s?",
        "Tell me how many {thing}s you see.",
    ),
    "caption": (
        "Describe the image.",
        "What does this image show?",
        "Write a short report.",
        "Give a caption for this picture.",
        "Summarise the findings.",
    ),
}


class Words:
    """Draws names and phrasings.

    Args:
        held_out: draw those that are never trained on, instead of the others.
    """

    def __init__(self, rng: np.random.Generator, held_out: bool = False) -> None:
        self.rng, self.held_out = rng, held_out

    def name(self, concept: str, plain: float = 0.0) -> str:
        """A name of a concept; with this probability the concept's own, which is its first."""
        names = NAMES.get(concept, (concept,))
        return names[0] if self.rng.random() < plain else self._draw(names)

    def phrase(self, key: str) -> str:
        return self._draw(PHRASES[key])

    def names(self, concepts: Sequence[str], plain: float = 0.0) -> list[str]:
        """A name for each concept: mostly of one style (the same place in each list), no two the same."""
        lists = [NAMES.get(concept, (concept,)) for concept in concepts]
        fewest = min(map(len, lists))
        if self.rng.random() < plain:
            return [names[0] for names in lists]
        if self.rng.random() < 0.6 or concepts[0] in PAIRED:
            place = -1 if self.held_out else int(self.rng.integers(max(fewest - 1, 1)))
            return [names[place if len(names) > 1 else 0] for names in lists]
        return [self._draw(names) for names in lists]

    def _draw(self, choices: Sequence[str]) -> str:
        if len(choices) == 1:
            return choices[0]
        return choices[-1] if self.held_out else choices[int(self.rng.integers(len(choices) - 1))]
