"""What a training goes by, kept in its states: a file edited since is told with both values.

Formatting does not count, nor does the place of the cache.
"""

import json
from typing import Any

from ich_keras.checkpoints import RUN, recorded_states
from ich_keras.data.csv_rows import FAULTS_SHOWN, first_few
from ich_keras.data.split import SPLITS
from ich_keras.errors import StaleError
from ich_keras.files import fingerprint, read_json
from ich_keras.run_folder import CACHE_PATH, START, RunFolder

SETTINGS = "settings"  # key in a state
_SHOWN_CHARACTERS = 60


def marks_of(run: RunFolder) -> dict[str, Any]:
    """Return what a state says of its run: its identity, and what its files say."""
    return {RUN: run.identity(), SETTINGS: _settings(run)}


def require_unedited(run: RunFolder) -> None:
    """Refuse an unfinished run whose files say something else than when it began.

    States of older versions have no record of them.

    Raises:
        StaleError: names the files, and what differs in them.
    """
    states = [state for state in recorded_states(run.state_folder) if SETTINGS in state]
    if not states:
        return
    now = _settings(run)
    differing = [_differences(state[SETTINGS], now) for state in states]
    closest = min(range(len(states)), key=lambda number: len(differing[number]))
    found = differing[closest]
    start = run.environment().get(START)
    if not found or (states[closest].get(RUN) or {}).get("start", start) != start:
        return  # `load_state` refuses the states of another run
    kept = run.state_folder / f"epoch-{states[closest]['epoch']:04d}" / "state.json"
    raise StaleError(
        f"{run} was changed since its training began: {first_few(found[:FAULTS_SHOWN], len(found))}"
        ".",
        f'Bring the files back; {kept} holds what they said, under "{SETTINGS}". Or start a new'
        " training.",
    )


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return the content of the files that a training goes by; of lists of UIDs only a digest."""
    found = {path.name: read_json(path) for path in _files(run) if path.is_file()}
    data = found.get(run.data_file.name)
    if isinstance(data, dict):
        found[run.data_file.name] = {key: data[key] for key in data if key != CACHE_PATH}
    split = found.get(run.split_file.name)
    if isinstance(split, dict) and isinstance(split.get("members"), dict):
        found[run.split_file.name] = {**split, "members": _brief(split["members"])}
    return found


def _files(run: RunFolder) -> tuple:
    return (
        run.config_file,
        run.recipe_file,
        run.data_file,
        run.split_file,
        run.started_from_file,
    )


def _brief(members: dict) -> dict:
    return {
        part: {"number": len(uids), "digest": fingerprint(uids)[:12]}
        if part in SPLITS and isinstance(uids, list)
        else uids
        for part, uids in members.items()
    }


def _differences(before: dict, now: dict) -> list[str]:
    found = [f"{name} is lost" for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before]
    for name in before:
        if name in now:
            one, other = _flat(before[name]), _flat(now[name])
            found += [
                f"{name}: {key} is {_shown(other, key)}, was {_shown(one, key)}"
                for key in one | other
                if key not in one or key not in other or one[key] != other[key]
            ]
    return found


def _flat(content: Any, place: str = "") -> dict[str, Any]:
    """Return the values of nested objects under dotted names."""
    if not isinstance(content, dict) or not content:
        return {place or "its content": content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{place}.{key}" if place else key)
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key])
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
