"""InputChanges: random changes of training inputs, asked for one by one; all off by default.

They come beside the augmentation (`ich_keras.data.augment`), from the same seeds of samples.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ich_keras.errors import UsageError
from ich_keras.models.options import Range

# Of the relative width, where a jitter of the level alone is asked for.
USUAL_WIDTH_JITTER = 0.1
RANGES = {
    "hu_noise": Range(0, 500, is_open=True),
    "window_jitter": Range(0, 500, is_open=True),
    "width_jitter": Range(0, 0.9, is_open=True),
    "drop_slices": Range(0, 0.9, is_open=True),
    "mixup": Range(0, 100, is_open=True),
    "cutmix": Range(0, 100, is_open=True),
}


@dataclass(frozen=True)
class InputChanges:
    """Random changes of training samples, by value; None leaves one out.

    Args:
        hu_noise: standard deviation, HU, of normal noise that is added to each pixel of each slice
            of the cache, before anything else; air that fills up a sample gets none.
        window_jitter: the level of all windows of a sample is moved by the same number of HU,
            uniform from minus to plus this.
        width_jitter: the widths of all windows of a sample are multiplied by the same number,
            uniform from 1 - this to 1 + this.
        drop_slices: chance that a slice of a sample is missing: air, or with edge "repeat" the one
            next to it on the side of the middle. The middle of a stack or slab never is, nor all
            slices of a series.
        mixup: alpha. Each sample of a batch is mixed with another one of it, pixels and labels
            alike, by a share from Beta(alpha, alpha).
        cutmix: alpha. A box of each sample is that of another one of its batch, and labels are
            mixed by its area, which is 1 minus a share from Beta(alpha, alpha). With both, each
            batch gets one of the two, with a chance of one half.

    Raises:
        UsageError: a number is out of range.

    Source:
        Zhang et al., mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019).

    >>> str(InputChanges(hu_noise=10.0, mixup=0.2))
    'HU noise of 10 HU, mixup (alpha 0.2)'
    """

    hu_noise: float | None = None
    window_jitter: float | None = None
    width_jitter: float | None = None
    drop_slices: float | None = None
    mixup: float | None = None
    cutmix: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or value not in allowed:
                raise UsageError(f"data.{name} is {value!r}; expected {allowed}.")

    @classmethod
    def asked_by(cls, settings: Any) -> "InputChanges":
        """Return the changes that a `DataConfig` asks for, complete."""
        found = cls(**{field.name: getattr(settings, field.name) for field in names()})
        if found.window_jitter is not None and found.width_jitter is None:
            return dataclasses.replace(found, width_jitter=USUAL_WIDTH_JITTER)
        return found

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in names())

    def __str__(self) -> str:
        level, width = self.window_jitter, self.width_jitter
        parts = [
            ("HU noise of {:g} HU", self.hu_noise),
            ("window levels moved by up to {:g} HU", level),
            ("window widths changed by up to {:.0%}", width),
            ("slices dropped with a chance of {:g}", self.drop_slices),
            ("mixup (alpha {:g})", self.mixup),
            ("CutMix (alpha {:g})", self.cutmix),
        ]
        return ", ".join(text.format(value) for text, value in parts if value is not None)

    @property
    def has_jitter(self) -> bool:
        """Whether windows are changed."""
        return self.window_jitter is not None or self.width_jitter is not None

    @property
    def mixes(self) -> bool:
        """Whether samples of a batch are mixed."""
        return self.mixup is not None or self.cutmix is not None

    def require_for(self, view: str, has_windows: bool) -> None:
        """Refuse changes that have no meaning for an input.

        Args:
            view: what a sample is, the kind of a `View`.
            has_windows: whether another window changes the input; not where each head is scaled by
                its own values.

        Raises:
            UsageError: one of them has none.
        """
        if self.drop_slices is not None and view == "slice":
            raise UsageError(
                "data.drop_slices drops neighbours; a single slice has none.",
                "Leave it out, or train on stacks, slabs or series.",
            )
        if self.mixes and view not in ("slice", "stack"):
            name = "mixup" if self.mixup is not None else "cutmix"
            raise UsageError(
                f"data.{name} mixes images of 2D networks; this run is on {view}s."
                if view != "series"
                else f"data.{name} mixes images of 2D networks; this run is on whole series.",
                "Leave it out, or train on slices or stacks.",
            )
        if self.has_jitter and not has_windows:
            raise UsageError(
                "data.window_jitter changes windows, which this intensity takes away again.",
                "Leave it out, or choose another --intensity.",
            )


def names() -> tuple[dataclasses.Field, ...]:
    """Return the fields of `InputChanges`."""
    return dataclasses.fields(InputChanges)


NO_CHANGES = InputChanges()
