"""What a declared training is.

The fields of `Run` are part of the fingerprint of a stored result (see `declare.declaration`):
renaming one makes every stored result stale. A new one must have a default, and be listed there.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, repeated for each seed.

    Args:
        title: what it is, for tables.
        preset: the network.
        view: slice, stack, slab or series.
        slices: of a stack or slab; None: three, or five.
        split: "patient"; "thesis-slices" and "thesis-series", in which the held-out samples also
            choose the model; "leaky" splits the slices of as many patients as the patient split
            trains on, see `splits.leaky_split`; "other" is a patient split of the second set of
            phantoms.
        fraction: of the training patients.
        weights: None from scratch; the name of a converted source; "run:KEY" the best weights of
            another run; "collapsed:KEY" the same, collapsed to 2D; "restrided:KEY" the same, with
            the strides and dilations of the preset.
        like: (what, key): as many "steps" or "operations" as another run (sets the epochs), or as
            much "memory" (sets the batch size).
        intensity, augment: as in `RunConfig`; None takes the scale's.
        normalise_first: imitate the thesis's order, normalisation before brightness and contrast.
        published: key of `tables.PUBLISHED`.
        first_seed: trained for the scale's first seed only.
        on: the run on whose slice network a sequence head is trained, seed by seed; `preset` then
            names the head (`sequence_gru`).
        learn_from: labels that such a head learns from: "slices", "series" or "both".
        end_to_end: train head and slice network together, after the head alone.
    """

    title: str
    preset: str
    view: str
    slices: int | None = None
    split: str = "patient"
    fraction: float = 1.0
    weights: str | None = None
    like: tuple[str, str] | None = None
    intensity: str | None = None
    augment: str | None = None
    normalise_first: bool = False
    published: str | None = None
    first_seed: bool = False
    on: str | None = None
    learn_from: str = "both"
    end_to_end: bool = False

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Keys of the runs whose weights it starts from."""
        kind, _, key = (self.weights or "").partition(":")
        return (key,) if kind in ("run", "collapsed", "restrided") else ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Keys of all runs that must have been trained before it."""
        return (*self.depends_on, *([self.on] if self.on else []))

    @property
    def needs_weights(self) -> str | None:
        """The converted source it starts from."""
        return None if self.weights is None or self.depends_on else self.weights

    @property
    def is_thesis(self) -> bool:
        """Whether its held-out samples also choose the model, as in the thesis."""
        return self.split.startswith("thesis-")


STAND_IN = "pretrained on other phantoms (stand-in)"
MEDICALNET_3D = "medicalnet_resnet18_23datasets"
MEDICALNET_2D = "medicalnet_resnet18_2d"  # the same, collapsed by `weights-convert collapse`
