"""The weights a run starts from: which are absent, and where they are."""

from experiments.place import Place
from experiments.run import MEDICALNET_2D
from experiments.runs import RUNS
from ich_keras.errors import UsageError
from ich_keras.models.presets import PRESETS
from ich_keras.models.weights_lookup import converted_file, find_weights
from ich_keras.run_folder import RunFolder

RESTRIDE = "restride"  # `Preset.via`


def absent_weights(key: str) -> str:
    """Return the command that provides the weights a run lacks; "" when it lacks none."""
    run = RUNS[key]
    source = run.needs_weights
    if source is None:
        return ""
    try:
        find_weights(source, run.preset)
    except UsageError:
        if source == MEDICALNET_2D:
            return (
                f"weights-convert collapse --weights FILE.weights.h5 --preset {run.preset} --out"
                f" {converted_file(source)}"
            )
        convert = f"weights-convert convert --source {source} --checkpoint FILE.pth"
        if PRESETS[run.preset].via != RESTRIDE:
            return convert
        path = converted_file(source)
        restride = f"weights-convert restride {path} --to {run.preset}"
        return restride if path.is_file() else f"{convert} && {restride}"
    return ""


def starting_weights(place: Place, weights: str, preset_name: str) -> str:
    """Return what a run starts from: the name of a source, or the file of another run's weights.

    Args:
        place: of the experiments.
        weights: as `Run.weights`.
        preset_name: of the network that receives the weights.
    """
    kind, _, key = weights.partition(":")
    if kind not in ("run", "collapsed", "restrided"):
        return weights
    best = RunFolder(place.run_dir(key, place.scale.seeds[0])).best_weights
    if kind == "run":
        return str(best)
    # In the run's own folder, so that it is removed when the run is trained again.
    if kind == "restrided":
        path = best.with_name(f"restrided-{preset_name}.weights.h5")
        if not path.is_file():
            from weights_convert import restride

            restride(best, preset_name, path)
        return str(path)
    path = best.with_name("collapsed.weights.h5")
    if not path.is_file():
        from weights_convert import collapse

        collapse(best, preset_name, path)
    return str(path)
