"""What `pretrain` does: which phantoms, which network, which settings. Declarations only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Drawn:
    """A set of phantoms; see `ich_keras.phantom.dicom.write_phantoms`.

    Args:
        num_series, seed, matrix, mix: as there.
        slice_spacing_mm: lowest and highest distance of slices.
    """

    num_series: int
    seed: int
    matrix: int
    slice_spacing_mm: tuple[float, float]
    mix: str


@dataclass(frozen=True)
class Plan:
    """A pretraining and its measurement.

    Args:
        preset: the network, on slices or slabs.
        size: rows and columns of its input.
        source: phantoms to learn from.
        epochs, batch_size, learning_rate: of the pretraining.
        target: phantoms of another seed and style.
        patients: that fine-tuning trains on, half of them with a bleed.
        fine_epochs: of each fine-tuning.
        rates: that each fine-tuning chooses from, by validation.
        seeds: of splits and fine-tunings.
        seed: of the pretraining.
    """

    preset: str
    size: int
    source: Drawn
    epochs: int
    batch_size: int
    learning_rate: float
    target: Drawn
    patients: int = 16
    fine_epochs: int = 30
    rates: tuple[float, ...] = (1e-3, 3e-4, 1e-4)
    seeds: tuple[int, ...] = (0, 1, 2)
    seed: int = 0

    @property
    def is_slab(self) -> bool:
        """Whether the network sees slabs."""
        return self.preset.endswith("_slab")


# Thin slices with bleeds spread evenly; thick ones in another matrix, spread as in RSNA 2019.
_SOURCE = Drawn(2000, 2000, 192, (5.0, 8.0), "even")
_TARGET = Drawn(200, 4000, 128, (8.0, 12.0), "rsna")
PLANS = {
    "resnet18_2d": Plan("resnet18_2d", 128, _SOURCE, 8, 32, 1e-3, _TARGET),
    "resnet18_3d_slab": Plan("resnet18_3d_slab", 96, _SOURCE, 4, 8, 3e-4, _TARGET),
}


def resized(plan: Plan, series: int | None, size: int | None, epochs: int | None) -> Plan:
    """Return a plan with other sizes; None leaves them as they are."""
    source = plan.source if series is None else replace(plan.source, num_series=series)
    return replace(plan, source=source, size=size or plan.size, epochs=epochs or plan.epochs)


def tiny(plan: Plan) -> Plan:
    """Return the same plan in minutes: shows that it works, and nothing else."""
    return replace(
        plan,
        size=48,
        source=Drawn(24, plan.source.seed, 64, (10.0, 13.0), plan.source.mix),
        epochs=1,
        target=Drawn(32, plan.target.seed, 64, (12.0, 15.0), plan.target.mix),
        patients=4,
        fine_epochs=1,
        rates=plan.rates[:1],
        seeds=(0,),
    )
