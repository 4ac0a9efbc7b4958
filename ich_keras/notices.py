"""Notices that accompany results, for every reader of a number."""

NOT_CLINICAL = "Not a medical device; not for clinical use."
SYNTHETIC_NOTE = (
    "**Synthetic data.** This run was trained and tested on phantoms (drawn head CT). Its numbers"
    " show that the programs work; they say nothing about patients."
)
SYNTHETIC_RUNS_NOTE = SYNTHETIC_NOTE.replace("This run was", "These runs were").replace(
    "Its numbers", "Their numbers"
)
TRAINED_ON_PHANTOMS = (
    "The network was trained on drawn phantoms only: its answers say nothing about patients."
)
# The column that carries `RunFolder.notice` in tables of an unfinished training's probabilities.
UNFINISHED = "unfinished"
