"""Commands that make something to look at: report, compare, show."""

import shlex
from pathlib import Path

import click

from ich_keras.cli.options import BACKEND, DEVICE, FOLDER
from ich_keras.errors import UsageError
from ich_keras.terminal import Command, terminal_width


@click.command(cls=Command)
@click.argument("run_dir", type=FOLDER, metavar="RUN")
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    metavar="DIR",
    help="That of the training: adds pictures of the worst misses and false alarms.",
)
@click.option(
    "--heat-maps",
    is_flag=True,
    help="With --cache: draw on the pictures where the network looked (torch).",
)
@BACKEND
@DEVICE
def report(
    run_dir: Path, cache_dir: Path | None, heat_maps: bool, backend: str | None, device: str
) -> None:
    """Make a run's report.html again: one page, with curves, tables and settings.

    A training writes it at its end; runs of older versions get one. For an unfinished run it is
    called report.unfinished.html.
    """
    from ich_keras.run_folder import CACHE_PATH, RunFolder
    from ich_keras.run_pages.report import write_report_page
    from ich_keras.workflow import open_cache

    if cache_dir is None and heat_maps:
        raise UsageError("--heat-maps is for the pictures, which need --cache.", "Add --cache.")
    cache = None if cache_dir is None else open_cache(cache_dir)
    maps = None
    if cache is not None and heat_maps:
        from ich_keras.environment import choose_backend
        from ich_keras.run_pages.heat import heat_maps_of

        choose_backend(backend)
        maps = heat_maps_of(RunFolder(run_dir), cache, device)
    written = write_report_page(run_dir, cache, maps)
    if cache is None:
        place = RunFolder(run_dir).data().get(CACHE_PATH) or "CACHE"
        command = shlex.join(["ich", "report", str(run_dir), "--cache", str(place)])
        click.echo(f"Without pictures, because it was made without the cache. With them: {command}")
    click.echo(f"Report: {written}")


@click.command(cls=Command)
@click.argument("run_dirs", type=FOLDER, metavar="RUN RUN...", nargs=-1)
@click.option("--out", type=FOLDER, metavar="HTML", help="New file: the same as a page.")
def compare(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Compare runs with the first of them, on the same test slices or series.

    Prints each metric's difference with its 95 % interval by patients, and the settings that
    differ. Slices are compared with whole series per series.
    """
    from ich_keras.comparison_summary import comparison_text
    from ich_keras.files import atomic_write, require_absent
    from ich_keras.run_pages.comparison import compare as compare_runs
    from ich_keras.run_pages.comparison_page import comparison_page

    if out is not None:
        _require_suffix(out, ".html", "the page is HTML")
        require_absent(out)
    found = compare_runs(run_dirs)
    click.echo(comparison_text(found, terminal_width()))
    if out is not None:
        atomic_write(out, comparison_page(found))
        click.echo(f"Page: {out}")


@click.command(cls=Command)
@click.argument("cache_dir", type=FOLDER, metavar="CACHE")
@click.option("--out", type=FOLDER, metavar="PNG", help="New file; default: inputs.png.")
@click.option("--view", default="slice", show_default=True, help="slice, stack, slab or series.")
@click.option(
    "--slices",
    "num_slices",
    type=click.IntRange(min=1),
    help="Of a stack, slab or series; 3, 5 and 60.",
)
@click.option("--size", type=click.IntRange(min=8), help="Of the input; default: the cache's.")
@click.option(
    "--intensity",
    help="windows, bone-windows, wide, head-z-score or hu; default: as in training.",
)
@click.option(
    "--augment", default="fast", show_default=True, help="fast, thesis, flip; none leaves it out."
)
@click.option("--count", type=int, default=6, show_default=True, help="Samples to show.")
@click.option("--epoch", type=int, default=1, show_default=True, help="Whose augmentation.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of samples and changes.")
@click.option(
    "--series",
    "number",
    type=int,
    metavar="N",
    help="Instead, all slices of the N-th series in the brain window.",
)
def show(
    cache_dir: Path,
    out: Path | None,
    view: str,
    num_slices: int | None,
    size: int | None,
    intensity: str | None,
    augment: str,
    count: int,
    epoch: int,
    seed: int,
    number: int | None,
) -> None:
    """Draw what enters a network: windows and labels, before and after augmentation.

    The picture carries numbers of series and slices, and no identifier of a patient.
    """
    from ich_keras.cache_pictures import Shown, inputs_picture, montage_picture
    from ich_keras.data.views import View
    from ich_keras.files import atomic_write, require_absent
    from ich_keras.recipe import DEFAULT_SLICES
    from ich_keras.workflow import open_cache

    out = Path("inputs.png" if number is None else f"series-{number}.png") if out is None else out
    _require_suffix(out, ".png", "the picture is a PNG")
    require_absent(out)
    cache = open_cache(cache_dir)
    if number is not None:
        picture = montage_picture(cache, number)
    else:
        usual = DEFAULT_SLICES.get(view, 1)
        shown = Shown(
            View(view, usual if num_slices is None else num_slices),
            size,
            intensity,
            None if augment == "none" else augment,
            count,
            epoch - 1,
            seed,
        )
        picture = inputs_picture(cache, shown)
    atomic_write(out, picture)
    click.echo(f"Picture: {out}")


def _require_suffix(out: Path, suffix: str, why: str) -> None:
    if out.suffix.lower() != suffix:
        raise UsageError(
            f"--out {out}: {why}; expected a name that ends in {suffix}.",
            f"Give --out {out.with_suffix(suffix)}" if out.name else "",
        )
