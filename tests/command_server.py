"""Commands in processes of their own that start at once: forked from one that has imported all.

A crash test starts dozens of commands, and importing Keras and torch takes seconds.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = "ICH_TEST_RECORD"  # a file that gets the name of each fail point as it is passed
PAUSE = "ICH_TEST_PAUSE"  # NAME*COUNT: the pass of a fail point at which to wait for a signal
PAUSED = "paused"  # printed there
NARROW = "narrow"  # a preset with an eighth of ResNet-18's channels, for 32 x 32 pixels
HANG_SECONDS = 300
SECONDS_TO_END = 10


@dataclass
class Command:
    """A command under way."""

    pid: int
    output: Path
    _server: subprocess.Popen

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def send(self, number: int) -> None:
        """Send a signal: Ctrl-C to its worker processes, too, as a terminal does."""
        if number == signal.SIGINT:
            os.killpg(self.pid, number)
        else:
            os.kill(self.pid, number)

    def wait_for(self, text: str) -> None:
        """Wait until it has printed a text."""
        deadline = time.monotonic() + HANG_SECONDS
        while text not in self.printed():
            assert time.monotonic() < deadline, f"{text!r} was never printed"
            time.sleep(0.01)

    def printed(self) -> str:
        """Return what it has printed so far."""
        if not self.output.exists():
            return ""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def left_over(self) -> list[int]:
        """Return its processes that run on without it, after a moment to end in."""
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := _processes_of_group(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def wait(self) -> tuple[int, str]:
        """Return (exit code, minus the signal if one ended it; standard output and error)."""
        _ask(self._server, "wait")
        code = json.loads(self._server.stdout.readline())
        return code, self.printed()


class CommandServer:
    """Runs `ich` commands, one at a time.

    Args:
        folder: for their output.
    """

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *arguments: object, **environment: str) -> Command:
        """Start a command; `environment` is added to this process's."""
        self._count += 1
        output = self._folder / f"output-{self._count}.txt"
        order = [list(map(str, arguments)), environment, str(output)]
        _ask(self._server, json.dumps(order))
        return Command(json.loads(self._server.stdout.readline()), output, self._server)

    def run(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """Run a command to its end; see `Command.wait`."""
        return self.start(*arguments, **environment).wait()

    def run_killed_after(self, seconds: float, *arguments: object) -> tuple[int, str]:
        """Run a command and kill it after some time, unless it has ended by then."""
        command = self.start(*arguments)
        time.sleep(seconds)
        command.kill()
        return command.wait()

    def __enter__(self) -> "CommandServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def _ask(server: subprocess.Popen, line: str) -> None:
    server.stdin.write(line + "\n")
    server.stdin.flush()


def _processes_of_group(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def _record_fail_points() -> None:
    from ich_keras import files

    stop_here, passes = files.fail_point, Counter()

    def record(name: str) -> None:
        if path := os.environ.get(RECORD):
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(name + "\n")
        passes[name] += 1
        if os.environ.get(PAUSE) == f"{name}*{passes[name]}":
            print(PAUSED, flush=True)
            time.sleep(HANG_SECONDS)
        stop_here(name)

    files.fail_point = record  # before any other module takes it by its name


def _run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    from ich_keras.cli import main

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    signal.alarm(HANG_SECONDS)
    os.environ.update(environment)
    null, sink = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(null, 0)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code = 1
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code or 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        # The modules that Python would take apart on its way out are the server's: a second each.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _serve() -> None:
    _record_fail_points()
    import keras  # noqa: F401

    import ich_keras.cli.data
    import ich_keras.cli.results
    import ich_keras.cli.train
    import ich_keras.models.torch.fast
    import ich_keras.workflow  # noqa: F401
    from ich_keras.models.presets import PRESETS, Preset
    from ich_keras.models.spec import ModelSpec

    PRESETS[NARROW] = Preset(ModelSpec(input_shape=(32, 32, 3), width=8), "narrow")
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _run(*json.loads(line))
        print(pid, flush=True)
        sys.stdin.readline()  # until the caller waits, the number stays the child's
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
