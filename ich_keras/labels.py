"""The six labels and their order, in one place.

Source: RSNA 2019 Brain CT Hemorrhage Challenge, `stage_2_train.csv` (Flanders et al., Radiology:
Artificial Intelligence 2020;2(3):e190211). `any` is the OR of the five subtypes in every row.
"""

SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
ANY = "any"
LABELS = (*SUBTYPES, ANY)
NUM_LABELS = len(LABELS)
# The competition's log loss counts `any` twice: weights 1 1 1 1 1 2, divided by 7.
RSNA_WEIGHTS = tuple(2.0 if label == ANY else 1.0 for label in LABELS)
