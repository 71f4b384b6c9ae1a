"""`write`: the report of a sweep, finished or not, from its folder."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rbf_jax.analysis.report import Section, markdown_table, write_report
from rbf_jax.data.files import write_text
from rbf_jax.sweeps import figures, results, space, table
from rbf_jax.sweeps.results import Group
from rbf_jax.sweeps.study import SweepStudy
from rbf_jax.sweeps.sweep import Sweep, SweepFolder
from rbf_jax.sweeps.table import Row

_MOST_POINTS = 40


def write(folder: SweepFolder, defaults: Mapping[str, Any], command: str) -> list[Path]:
    """Writes report.md, its figures, numbers.json, trials.csv and best_config.py.

    Args:
      folder: of the sweep.
      defaults: of the whole configuration, nested.
      command: what the report says wrote it.

    Returns:
      The files written, report.md first.

    Raises:
      ValueError: the folder holds no sweep.
    """
    study = SweepStudy(folder)
    sweep, rows, out = study.sweep, table.rows(study), folder.report
    found = {part.name: results.groups(sweep, part, rows) for part in sweep.parts}
    top = results.best(group for groups in found.values() for group in groups)
    sections = [_overview(sweep, rows, top, out)]
    for part in sweep.parts:
        sections += _part_sections(sweep, part, found[part.name])
    sections += [*_failures(rows), Section("Written by", _written_by(command))]
    paths = write_report(out, f"Sweep {folder.path.name}", sections, _numbers(command, rows, found))
    paths.append(out / "trials.csv")
    write_text(paths[-1], results.to_csv(rows, sweep.objective))
    if top is not None:
        docstring = _docstring(folder, out, top, sweep)
        config = sweep.config(top.point.values, 0)
        text = results.config_file(config, defaults, docstring)
        paths.append(out / "best_config.py")
        write_text(paths[-1], text)
    return paths


def _overview(sweep: Sweep, rows: Sequence[Row], top: Group | None, out: Path) -> Section:
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none begun"
    lines = [
        f"{sweep.num_trials} trials: {states}. Each point has {_seeds(sweep.seeds)}; its value is "
        f"the mean over them of the {_label(sweep)}. All trials: [trials.csv](trials.csv)."
    ]
    if top is None:
        lines.append("No trial has finished yet.")
    else:
        lines.append(
            f"Best: **{top.mean:.4f}**{_spread(top)} with {_settings(top.point.params)}. To train "
            "it again: [best_config.py](best_config.py), "
            f"`python -m experiments.train --config={_place(out)}`."
        )
        lines.append(_caution(top))
    return Section("Result", "\n\n".join(lines))


def _part_sections(sweep: Sweep, part: space.Part, groups: Sequence[Group]) -> list[Section]:
    title = f"Part {part.name!r}" if part.name else "Points"
    names = [axis.name for axis in part.varying]
    ordered = sorted(groups, key=lambda group: (not group.values, group.mean))
    header = [*(names or ["point"]), "mean", "deviation", "seeds", "pruned", "failed"]
    body = [_point_row(group, names) for group in ordered[:_MOST_POINTS]]
    left_out = len(ordered) - len(body)
    more = f"\n\n{left_out} more are in trials.csv." if left_out > 0 else ""
    sections = [Section(title, markdown_table([header, *body]) + more)]
    label = _label(sweep)
    if (figure := figures.parameters_figure(sweep, part, groups, label)) is not None:
        text = (
            "Means over the seeds, with the standard deviation as bars. A cross at the upper edge "
            "marks a point of which a trial has failed."
        )
        sections.append(
            Section(f"{title}: each parameter", text, {_stem("parameters", part): figure})
        )
    if (figure := figures.parallel_figure(part, groups, label)) is not None:
        text = "A line for each point; the darker, the better. The best is thick and black."
        sections.append(
            Section(f"{title}: all parameters", text, {_stem("parallel", part): figure})
        )
    sections.append(Section(f"{title}: importance", _importance(part, groups)))
    return sections


def _importance(part: space.Part, groups: Sequence[Group]) -> str:
    shares = results.importances(part, groups)
    if isinstance(shares, str):
        return shares
    trials = sum(len(group.values) for group in groups)
    body = [[name, f"{share:.2f}"] for name, share in shares.items()]
    return (
        f"{markdown_table([['parameter', 'share'], *body])}\n\nBy PED-ANOVA (Optuna) on {trials} "
        "finished trials: how much a parameter tells the best quarter of them from the rest. Rough "
        "with less than a hundred."
    )


def _failures(rows: Sequence[Row]) -> list[Section]:
    failed = [[str(row.number), f"{row.step}/{row.steps}", row.error] for row in rows if row.error]
    if not failed:
        return []
    return [Section("Failed trials", markdown_table([["trial", "step", "why"], *failed]))]


def _machines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Devices and versions of the finished trials, each that differs once."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row.state == "finished":
            summary = json.loads((row.folder / "summary.json").read_text(encoding="utf-8"))
            machine = {key: summary[key] for key in ("device", "versions")}
            found += [machine] if machine not in found else []
    return found


def _numbers(command: str, rows: Sequence[Row], found: Mapping[str, Sequence[Group]]) -> Any:
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machines": _machines(rows),
        "trials": [{**dataclasses.asdict(row), "folder": row.folder.name} for row in rows],
        "points": {
            name: [
                {
                    "params": group.point.params,
                    "mean": group.mean,
                    "deviation": group.deviation,
                    "values": {str(seed): value for seed, value in group.values.items()},
                    "pruned": group.pruned,
                    "failed": group.failed,
                }
                for group in groups
            ]
            for name, groups in found.items()
        },
    }


def _point_row(group: Group, names: Sequence[str]) -> list[str]:
    settings = [table.text(group.point.params[name]) for name in names] or ["all"]
    deviation = f"{group.deviation:.4f}" if len(group.values) > 1 else ""
    counts = [str(n) if n else "" for n in (len(group.values), group.pruned, group.failed)]
    return [*settings, table.number(group.mean), deviation, *counts]


def _docstring(folder: SweepFolder, out: Path, top: Group, sweep: Sweep) -> str:
    return (
        f"The best point of sweep {folder.path.name}: {_settings(top.point.params)}.\n\n"
        f"Command:  python -m experiments.train --config={_place(out)}\n"
        f"Expect:   {_label(sweep)} {top.mean:.4f}{_spread(top)}.\n"
    )


def _caution(top: Group) -> str:
    if len(top.values) < 2:
        return (
            "**One seed is no proof**: part of every difference is chance, and one seed does not "
            "show how large a part."
        )
    return "Differences of the size of the deviation are chance."


def _spread(group: Group) -> str:
    seeds = _seeds(len(group.values))
    return f" ± {group.deviation:.4f} ({seeds})" if len(group.values) > 1 else f" ({seeds})"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _settings(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {table.text(v)}" for k, v in params.items()) or "the base as it is"


def _label(sweep: Sweep) -> str:
    return f"{sweep.objective} validation loss"


def _stem(kind: str, part: space.Part) -> str:
    return f"{kind}_{part.name}" if part.name else kind


def _written_by(command: str) -> str:
    date = datetime.date.today().isoformat()
    return f"`{command}`, {date}. The numbers are in [numbers.json](numbers.json)."


def _place(out: Path) -> str:
    """Of best_config.py, from where the program runs."""
    return os.path.relpath(out / "best_config.py")
