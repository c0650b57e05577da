"""report: one HTML page, and the same as JSON and CSV, of one run or of several side by side."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefication_cli.config import ReportConfig
from moefication_cli.errors import ConfigError, MissingArtifactError
from moefication_cli.evaluation.report.gather import ReportData, gather
from moefication_cli.evaluation.report.page import page
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.inputs import begin_options, open_model
from moefication_cli.store import files, jsonio
from moefication_cli.store.artifact import stages_in
from moefication_cli.store.rundir import RunDir


def report(runs: Sequence[RunDir], config: ReportConfig, control: Control = Control()) -> Result:
    """Write report.html, report.json and report.csv: to RUN/report, or for several runs to the folder `out`.

        report([RunDir("RUN")], ReportConfig()).path

    Raises MissingArtifactError for a folder in which nothing was made, ConfigError for several runs without `out`.
    """
    for run in runs:
        if not any(run.manifest(stage) is not None for stage in stages_in(run.root) if stage != "report"):
            raise MissingArtifactError(
                f"{run.root}: nothing has been made here yet",
                f"moefication run {run.root} --model MODEL --data DATA --eval-data TEST",
            )
    if len(runs) > 1 and config.out is None:
        raise ConfigError("a report of several runs needs a folder of its own", "name it with --out")
    if config.out is not None:
        folder = Path(config.out)
        files.make_dirs(folder)
        found = [_gather(run, control) for run in control.track(list(runs), "report", len(runs))]
        _write(found, folder)
        return _result(found, folder, up_to_date=False)
    run = runs[0]
    model = open_model(run, None, control)
    made = {stage: run.require(stage) for stage in stages_in(run.root) if stage != "report" and run.manifest(stage)}
    with run.begin("report", begin_options(config, control, model, made)) as work:
        if not work.up_to_date:
            _write([_gather(run, control)], work.folder)
            work.finish({"stages": sorted(made)})
    return _result([], run.path("report"), up_to_date=work.reason is None)


def _gather(run: RunDir, control: Control) -> ReportData:
    return gather(run, open_model(run, None, control), control)


def _write(found: Sequence[ReportData], folder: Path) -> None:
    jsonio.write(folder / "report.json", {"schema": "moefication/report@1", "runs": [data.to_json() for data in found]})
    files.atomic_write(folder / "report.csv", _csv(found).encode())
    files.atomic_write(folder / "report.html", page(found).encode())


def _csv(found: Sequence[ReportData]) -> str:
    """One line per row of every evaluation."""
    rows: list[dict[str, Any]] = []
    for data in found:
        for metrics in data.evaluations:
            for row in metrics["rows"]:
                plain = {key: value for key, value in row.items() if not isinstance(value, list)}
                rows.append({"run": data.name, "evaluation": metrics["name"], "data": metrics["data"], **plain})
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["run"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _result(found: Sequence[ReportData], folder: Path, up_to_date: bool) -> Result:
    notes = [f"report: {folder / 'report.html'}   numbers: {folder / 'report.csv'}, {folder / 'report.json'}"]
    missing = [entry for data in found for entry in data.missing]
    notes += [f"not in it: {entry}" for entry in missing]
    return Result("report", [], {"path": str(folder / "report.html")}, up_to_date=up_to_date, notes=notes)
