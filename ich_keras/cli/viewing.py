"""`ich view`: the slices of a scan, to look at."""

from pathlib import Path

import click

from ich_keras.cli.options import ANY_IMAGE_TYPE, FOLDER, SHOW_PATIENT, WORKERS, num_workers
from ich_keras.terminal import Command, open_terminal


@click.command(cls=Command)
@click.argument("dicom", type=FOLDER, metavar="DICOM")
@click.option("--out", type=FOLDER, metavar="HTML", help="New file; default: NAME.html, here.")
@ANY_IMAGE_TYPE
@SHOW_PATIENT
@WORKERS
def view(
    dicom: Path, out: Path | None, any_image_type: bool, show_patient: bool, workers: int | None
) -> None:
    """Make one HTML page to look through the slices of a folder, an archive or a file.

    It takes DICOM and NIfTI (.nii, .nii.gz), and shows every series, heads or not. It needs no
    network, neither to be made nor to be looked at.

    Not a medical device; not for clinical use.
    """
    from ich_keras import viewing

    name = dicom.absolute().name
    while Path(name).suffix.lower() in (".dcm", ".gz", ".nii", ".tar", ".zip"):
        name = Path(name).stem
    with open_terminal() as terminal:
        written = viewing.view(
            dicom,
            out or Path(f"{name or 'scan'}.html"),
            num_workers(workers),
            any_image_type,
            show_patient,
            terminal.progress,
        )
    click.echo(f"Page: {written}")
