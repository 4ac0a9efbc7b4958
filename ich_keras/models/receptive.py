"""Where the cells of a feature map lie in the network's input.

A cell sees a field of the input: its receptive field. Strides, kernels, dilation and padding on the
way decide where the middle of that field is. It is seldom where the cell would lie if the feature
map were stretched over the input: with the padding of our networks, the first cell of every map
looks at the first pixel, and the last one at whatever pixel the strides end at.

Source:
    Araujo, Norris, Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill
    (2019), doi 10.23915/distill.00021.
"""

from dataclasses import dataclass

from ich_keras.models.graph import Graph, Step, UnknownStep


@dataclass(frozen=True)
class CellAxis:
    """Where the cells of a feature map lie along one axis of the input, in its pixels.

    Args:
        step: between neighbouring cells.
        low: first pixel that cell 0 sees; below 0 in the padding.
        high: last pixel that cell 0 sees.

    >>> CellAxis(2, -3, 3).centre, CellAxis(2, -3, 3).width
    (0.0, 7)
    """

    step: int = 1
    low: int = 0
    high: int = 0

    @property
    def centre(self) -> float:
        """The middle of what cell 0 sees; 0 is the middle of the first pixel."""
        return (self.low + self.high) / 2

    @property
    def width(self) -> int:
        """How many pixels a cell sees."""
        return self.high - self.low + 1


def cell_axes(graph: Graph, value: int, rank: int) -> tuple[CellAxis, ...]:
    """Find where the cells of a value lie in the input.

    Normalisation by groups of channels and squeeze-and-excitation look at the whole image; this is
    not counted.

    Args:
        graph: of the network.
        value: number of the value, as in `Graph.steps` and `Graph.outputs`; 0 is the input.
        rank: number of spatial axes: 2 or 3.

    Returns:
        One for each spatial axis.

    Raises:
        UnknownStep: the value has no spatial axes, or paths of different strides meet in it.
    """
    axes: dict[int, tuple[CellAxis, ...] | None] = {0: (CellAxis(),) * rank}
    for step in graph.steps:
        if value in axes:
            break
        axes[step.target] = _after(step, [axes[source] for source in step.sources])
    found = axes.get(value)
    if found is None:
        raise UnknownStep(f"value {value} has no rows and columns")
    return found


def _after(step: Step, sources: list[tuple[CellAxis, ...] | None]) -> tuple[CellAxis, ...] | None:
    """Return the axes of what a step makes; None once they are pooled away."""
    first = next((source for source in sources if source is not None), None)
    if first is None or step.kind in ("mean", "dense"):
        return None
    if step.kind == "conv":
        sizes, strides, dilations = (
            step.layer.kernel_size,
            step.layer.strides,
            step.layer.dilation_rate,
        )
        return _windowed(first, sizes, strides, dilations, step.amounts)
    if step.kind in ("max_pool", "avg_pool"):
        sizes = step.layer.pool_size
        return _windowed(first, sizes, step.layer.strides, (1,) * len(sizes), step.amounts)
    if step.kind == "pad":
        befores = [before for before, _ in step.amounts]
        ones = (1,) * len(befores)
        return _windowed(first, ones, ones, ones, befores)
    if step.kind == "subsample":
        ones = (1,) * len(first)
        return _windowed(first, ones, step.amounts, ones, (0,) * len(first))
    if step.kind in ("add", "concat"):
        return _joined(step, sources)
    if step.kind == "multiply":
        return _joined(step, [source for source in sources if source is not None])
    return first


def _windowed(
    axes: tuple[CellAxis, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    paddings: tuple[int, ...] | list[int],
) -> tuple[CellAxis, ...]:
    return tuple(
        CellAxis(
            axis.step * stride,
            axis.low - axis.step * padding,
            axis.high + axis.step * ((size - 1) * dilation - padding),
        )
        for axis, size, stride, dilation, padding in zip(
            axes, sizes, strides, dilations, paddings, strict=True
        )
    )


def _joined(step: Step, sources: list[tuple[CellAxis, ...] | None]) -> tuple[CellAxis, ...]:
    """Return what several values together see: what any of them sees."""
    found = []
    for parts in zip(*(source or () for source in sources), strict=True):
        if len({part.step for part in parts}) > 1:
            raise UnknownStep(f"{step.name} joins values of different strides")
        found.append(
            CellAxis(
                parts[0].step, min(part.low for part in parts), max(part.high for part in parts)
            )
        )
    return tuple(found)
