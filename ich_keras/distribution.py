"""A training by several processes: what it can be, what is said of it, and how it begins.

How they take a step together is in models/torch/distributed.py; which process this is, in ranks.py.
"""

from typing import TYPE_CHECKING, Any

from ich_keras.checkpoints import averages_of
from ich_keras.environment import PROCESSES
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.inference import network_digest
from ich_keras.keras_private import tensor_of
from ich_keras.models.options import SYNCHRONISED
from ich_keras.ranks import Rank
from ich_keras.recipe import Recipe

if TYPE_CHECKING:
    from ich_keras.models.torch.distributed import Group


def require_torch(backend: str | None, rank: Rank) -> None:
    """Refuse several processes on a backend that does not carry them out.

    Args:
        backend: None is not decided yet.
        rank: of this process.

    Raises:
        UsageError: the backend is not torch.
    """
    if not rank.is_alone and backend not in (None, "torch"):
        raise UsageError(
            f"{rank.of} processes on the backend {backend}; several train on torch only.",
            "Use --backend torch, or one process.",
        )


def require_distributable(recipe: Recipe, rank: Rank) -> None:
    """Refuse what several processes cannot train as one would; one process can do it all.

    Raises:
        UsageError: the backend is not torch, the steps are Keras' own, or the batch cannot be cut
            into as many equal parts.
    """
    if rank.is_alone:
        return
    require_torch(recipe.backend, rank)
    training = recipe.training
    if training.step != "fast":
        raise UsageError(
            f"step {training.step!r} with {rank.of} processes; several train on the fast steps"
            " only.",
            "Leave out --step, or train in one process.",
        )
    if training.batch_size % rank.of:
        larger = -(-training.batch_size // rank.of) * rank.of
        fewer = max(1, round(training.batch_size * training.accumulate / larger))
        same = f" --accumulate {fewer}" if training.accumulate > 1 else ""
        raise UsageError(
            f"a batch of {training.batch_size} cannot be cut into equal parts for {rank.of}"
            " processes.",
            f"--batch-size is that of all processes together: take {larger}{same}, for instance.",
        )


def has_own_statistics(recipe: Recipe) -> bool:
    """Tell whether batch normalisation in several processes takes the statistics of each."""
    return recipe.network.norm == "batch" and recipe.training.batch_norm != SYNCHRONISED


def samples_per_statistics(recipe: Recipe, rank: Rank) -> int:
    """Return from how many samples batch normalisation takes its statistics."""
    return recipe.training.batch_size // (rank.of if has_own_statistics(recipe) else 1)


def distribution_lines(recipe: Recipe, rank: Rank) -> list[str]:
    """Say what a training by several processes does, one line each; nothing for one process."""
    if rank.is_alone:
        return []
    training = recipe.training
    own = training.batch_size // rank.of
    lines = [
        f"{rank.of} processes: each batch of {training.batch_size} is cut into parts of {own}; the"
        f" learning rate {training.learning_rate:g} is for the whole batch, as given."
    ]
    if has_own_statistics(recipe):
        lines.append(
            f"Batch normalisation takes the statistics of each process's {own} samples; after each"
            " epoch all take the running ones of the first. One process would give other weights;"
            " --batch-norm synchronised gives the same."
        )
    elif recipe.network.norm == "batch":
        lines.append("Batch normalisation takes the statistics of the whole batch.")
    return lines


def join_group(recipe: Recipe, rank: Rank) -> "Group | None":
    """Meet the other processes of a training; None for a process alone.

    Raises:
        UsageError: see `require_distributable`.
        LostProcess: they do not meet.
    """
    require_distributable(recipe, rank)
    if rank.is_alone:
        return None
    from ich_keras.models.torch.distributed import join

    return join(rank, recipe.device)


def require_agreement(group: "Group | None", facts: dict[str, Any]) -> None:
    """Refuse processes that would not train the same.

    Args:
        group: None for a process alone.
        facts: name -> what must be equal in all processes.

    Raises:
        UsageError: in all processes, naming the one that differs from the first, and in what.
    """
    for number, others in enumerate([] if group is None else group.gather(facts)):
        if number == 0:
            first = others
        differing = [name for name, value in first.items() if others[name] != value]
        if differing:
            raise UsageError(
                f"process {number} of the training has another {' and '.join(differing)} than"
                " process 0.",
                "Start all processes with the same options and the same files.",
            )


def require_same_statistics(before: dict[str, Any], recipe: Recipe, rank: Rank) -> None:
    """Refuse to resume with another number of processes where the numbers would be others.

    Args:
        before: the environment in which the training began.
        recipe: of the training.
        rank: of the process that resumes.

    Raises:
        StaleError: batch normalisation takes statistics per process, and their number differs.
    """
    began = before.get(PROCESSES, 1)
    if began != rank.of and has_own_statistics(recipe):
        how = f"with --gpus {began}" if began > 1 else "in one process, without --gpus"
        raise StaleError(
            f"the training began in {began} process{'' if began == 1 else 'es'}, now there"
            f" {'is 1' if rank.of == 1 else f'are {rank.of}'}: batch normalisation would take its"
            " statistics from other samples.",
            f"Resume it {how}.",
        )


def begin_together(model: Any, group: "Group", synchronised: bool) -> None:
    """Give a compiled network the steps of all processes, and the first one's variables.

    Args:
        model: of this process.
        group: of the training.
        synchronised: batch normalisation by the statistics of all processes.

    Raises:
        EnvironmentProblem: the weights differ all the same, or a process is lost.
    """
    from ich_keras.models.torch.step import distribute

    distribute(model, group, synchronised)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables, *averages_of(model)]
    group.take_from_first([tensor_of(variable) for variable in variables])
    _require_alike(model, group, "at the beginning")


def come_together(model: Any, group: "Group", when: str) -> None:
    """Give each process the first one's running statistics, and see that all weights are alike.

    Args:
        model: of this process.
        group: of the training.
        when: for the message.

    Raises:
        EnvironmentProblem: the weights differ, or a process is lost.
    """
    group.take_from_first([tensor_of(variable) for variable in model.non_trainable_variables])
    _require_alike(model, group, when)


def _require_alike(model: Any, group: "Group", when: str) -> None:
    digests = group.gather(network_digest(model))
    others = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise EnvironmentProblem(
            f"process {others[0]} has other weights than the first {when}.",
            "Processors, GPUs and versions must be of one kind. Resume the training on such.",
        )
