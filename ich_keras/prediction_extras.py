"""What is written beside the tables of a prediction, when it is asked for: pages to look at, and
structured reports for a PACS."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ich_keras.context import MAPS_ALONE
from ich_keras.ct.series import SeriesIndex
from ich_keras.errors import UsageError
from ich_keras.files import fingerprint
from ich_keras.prediction_members import Member
from ich_keras.prediction_tables import FolderPrediction
from ich_keras.progress import Progress

if TYPE_CHECKING:
    from ich_keras.report_maps import MapMaker
    from ich_keras.study_reports import Reports


@dataclass(frozen=True)
class Extras:
    """What is asked for.

    Args:
        report: a page for each study (`study_reports`).
        show_patient: on those pages, tell the PatientID.
        heat_maps: on those pages, and as secondary captures beside structured reports, what the
            answers rest on, by a method of `relevance.METHODS`, which takes about as long as the
            prediction; None makes none.
        structured_reports: one DICOM structured report per study (`structured_report`).
    """

    report: bool = False
    show_patient: bool = False
    heat_maps: str | None = None
    structured_reports: bool = False

    def require(self, out: Path | str | None) -> None:
        """Refuse what cannot be, before anything is read.

        Args:
            out: where it is to be written.

        Raises:
            UsageError: there is no such folder, or an option of pages without pages.
            EnvironmentProblem: a package is missing.
        """
        if self.show_patient and not self.report:
            raise UsageError("show_patient is about the pages of report, which is not asked for.")
        if self.heat_maps is not None and not (self.report or self.structured_reports):
            raise UsageError("heat_maps is about report and sr, of which none is asked for.")
        for is_asked, name in ((self.report, "report"), (self.structured_reports, "sr")):
            if is_asked and out is None:
                raise UsageError(f"{name} needs a folder to write to.", "Give out.")
        if self.structured_reports:
            from ich_keras.structured_report import require_highdicom

            require_highdicom()

    def prepared(self, members: Sequence[Member], thin: str) -> "PreparedExtras":
        """Prepare it for some runs.

        Args:
            members: that predict.
            thin: what is done with thin series.

        Raises:
            StaleError: a file of a run is damaged.
            UsageError: heat maps cannot be made.
        """
        reports = maker = None
        if self.report:
            from ich_keras.study_reports import Reports  # what makes pages is heavy

            reports = Reports.of(members, self.show_patient, self.heat_maps, thin)
        if self.structured_reports and self.heat_maps is not None:
            from ich_keras.report_maps import MapMaker

            maker = MapMaker(members, self.heat_maps, thin)
        return PreparedExtras(self, members, reports, maker)


@dataclass(frozen=True, eq=False)
class PreparedExtras:
    """What is asked for, of some runs.

    Args:
        asked: for what.
        members: the runs.
        reports: what pages hold; None without pages.
        maker: of heat maps for a PACS; None without them.
    """

    asked: Extras
    members: Sequence[Member]
    reports: "Reports | None"
    maker: "MapMaker | None" = None

    def written(
        self,
        folder: Path,
        prediction: FolderPrediction,
        index: SeriesIndex,
        root: Path,
        progress: Progress | None,
    ) -> FolderPrediction:
        """Write it, and return the prediction with what is to be said of it.

        Args:
            folder: of the prediction.
            prediction: finished; its paths are inside `root`.
            index: what was predicted.
            root: the predicted folder.
            progress: called as progress(step, done, total) in studies.

        Raises:
            EnvironmentProblem: a file cannot be written.
        """
        if self.asked.heat_maps is not None and self.members[0].context is not None:
            notice = f"{prediction.notice}\n{MAPS_ALONE}"
            prediction = dataclasses.replace(prediction, notice=notice)
        if self.reports is not None:
            from ich_keras.study_reports import write_reports

            prediction = write_reports(self.reports, folder, prediction, index, root, progress)
        if self.asked.structured_reports:
            from ich_keras.structured_report import write_structured_reports

            run = fingerprint([member.digest for member in self.members])
            made = write_structured_reports(folder, prediction, index, run, progress, self.maker)
            notice = "\n".join([prediction.notice, *made.sentences()])
            prediction = dataclasses.replace(prediction, notice=notice)
        return prediction
