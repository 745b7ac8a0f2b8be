"""Everything that is wrong with a data set, in one pass and before anything is trained on it.

Errors are what `read_records` and `load_image` would refuse, and options that can be read in more than one way;
a data set with errors is not trained on. Warnings are probably wrong, notes only worth knowing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vitos.core.record import Record, option_problems
from vitos.data.images import DataError, ImageError, ImageFacts, load_image_facts
from vitos.data.picture import split_name
from vitos.data.readers import Problem, Severity, iter_entries, record_files

HUGE_PIXELS = 16_000_000
_THREADS = 4
_USUAL_MODES = ("RGB", "L", "MONOCHROME1", "MONOCHROME2", "int16", "uint16")
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Problems and figures of a data set; figures count valid records only.

    Attributes:
        source: the file or folder checked.
        problems: in the order of the files; those of images after those of records.
        items: items in the files, valid or not.
        records: valid records.
        images: distinct image files that the items name.
        templates: `meta.template` → records.
        answers: letter → records.
        boxes: evidence boxes.
        evidence_share: median over boxed records of the sum of box areas, in 0..1 of the image; None if no boxes.
        smallest, largest: (width, height) of the images with the fewest and most pixels; None if none decodes.
    """

    source: str
    problems: tuple[Problem, ...]
    items: int
    records: int
    images: int
    templates: Mapping[str, int]
    answers: Mapping[str, int]
    boxes: int
    evidence_share: float | None
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None

    def of(self, severity: Severity) -> tuple[Problem, ...]:
        """The problems of one severity."""
        return tuple(problem for problem in self.problems if problem.severity == severity)

    def raise_if_errors(self) -> None:
        """Refuse a data set that has errors; warnings and notes pass.

        Raises:
            DataError: with the first ten errors.
        """
        errors = self.of("error")
        if errors:
            lines = [f"{self.source}: {len(errors)} error(s) in {self.items} items", *map(str, errors[:10])]
            if len(errors) > 10:
                lines.append(f"… run `vitos data check {self.source}` for all")
            raise DataError("\n".join(lines))


def check_dataset(source: str | Path, *, progress: Progress | None = None) -> CheckReport:
    """Validate every item of a record file, or of all those in a folder, and decode every image once.

    Args:
        source: as for `read_records`.
        progress: called with (images done, images in all) after each image.

    Raises:
        DataError: only if `source` names no record file at all.
    """
    problems: list[Problem] = []
    records: list[Record] = []
    users: dict[Path, str] = {}  # image → the first sample that uses it
    items = 0
    for file in record_files(source):
        for entry in iter_entries(file):
            items += entry.is_item
            problems.extend(entry.problems)
            for image in entry.images:
                users.setdefault(image, entry.sample)
            if entry.record is not None:
                records.append(entry.record)
                doubts = option_problems(entry.record.question)
                once = "write each option once, on one line of its own"
                problems += [Problem(entry.sample, "question", doubt, once) for doubt in doubts]
                if not doubts and not entry.record.options:
                    problem, remedy = "no options were found in it", "write them as A. … B. … if it has any"
                    problems.append(Problem(entry.sample, "question", problem, remedy, "warning"))

    images = _decode_all(list(users), progress)
    names_of: dict[str, list[Path]] = defaultdict(list)
    sizes: list[tuple[int, int]] = []
    for path, (digest, outcome) in images.items():
        if isinstance(outcome, ImageError):
            problems.append(Problem(users[path], "image_path", f"{path.name}: {outcome.reason}", "replace it"))
            continue
        sizes.append((outcome.width, outcome.height))
        names_of[digest].append(path)
        problems.extend(_remarks(users[path], path, outcome))
    for paths in names_of.values():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths[:5])
            problem, remedy = f"{len(paths)} files have the same bytes: {names}", "make sure no split shares an image"
            problems.append(Problem(users[paths[0]], "image_path", problem, remedy, "note"))

    shares = [sum(box.area for box in record.boxes) for record in records if record.boxes]
    return CheckReport(
        source=str(source),
        problems=tuple(problems),
        items=items,
        records=len(records),
        images=len(images),
        templates=Counter(record.meta["template"] for record in records if "template" in record.meta),
        answers=dict(sorted(Counter(record.answer for record in records).items())),
        boxes=sum(len(record.boxes or ()) for record in records),
        evidence_share=median(shares) if shares else None,
        smallest=min(sizes, key=lambda size: size[0] * size[1], default=None),
        largest=max(sizes, key=lambda size: size[0] * size[1], default=None),
    )


def render_check(report: CheckReport, max_rows: int = 100) -> Group:
    """A table of figures and a table of problems, worst first, for a rich console; at most `max_rows` problems."""
    figures = Table(title=Text(report.source), show_header=False, title_justify="left")
    rows = {
        "records": f"{report.records} valid of {report.items}",
        "images": str(report.images),
        "image sizes": f"{_size(report.smallest)} to {_size(report.largest)}",
        "answers": _counts(report.answers),
        "templates": _counts(report.templates),
        "boxes": str(report.boxes),
        "evidence, median": "–" if report.evidence_share is None else f"{report.evidence_share:.1%} of the image",
    }
    for name, value in rows.items():
        figures.add_row(name, Text(value))
    ordered = [problem for severity in _STYLES for problem in report.of(severity)]
    if not ordered:
        return Group(figures, Text("No problems found.", style="green"))
    counts = ", ".join(f"{len(report.of(severity))} {severity}(s)" for severity in _STYLES)
    table = Table("severity", "sample", "field", "problem", "what to do", title=counts, title_justify="left")
    for problem in ordered[:max_rows]:
        cells = (problem.sample, problem.field, problem.problem, problem.remedy)
        table.add_row(Text(problem.severity, style=_STYLES[problem.severity]), *map(Text, cells))
    hidden = len(ordered) - max_rows
    return Group(figures, table, *([Text(f"… and {hidden} more")] if hidden > 0 else []))


def _decode_all(paths: list[Path], progress: Progress | None) -> dict[Path, tuple[str, ImageFacts | ImageError]]:
    """Path → (SHA-256 of its bytes, facts or the reason why it cannot be used), decoded in a few threads."""
    results: dict[Path, tuple[str, ImageFacts | ImageError]] = {}
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for path, result in zip(paths, pool.map(_decode, paths), strict=True):
            results[path] = result
            if progress is not None:
                progress(len(results), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # or Ctrl-C would wait for every image
    return results


def _decode(path: Path) -> tuple[str, ImageFacts | ImageError]:
    try:
        facts = load_image_facts(path)[1]
        source, selector = split_name(path)
        with source.open("rb") as file:  # two frames of a file are two images
            return hashlib.file_digest(file, "sha256").hexdigest() + selector, facts
    except ImageError as error:
        return "", error


def _remarks(sample: str, path: Path, facts: ImageFacts) -> list[Problem]:
    """What is unusual about an image that can be used."""
    remarks = [
        Problem(sample, "image_path", f"{path.name}: {text}", "see docs/data.md", "warning") for text in facts.warnings
    ]
    if facts.rotated:
        problem, remedy = f"{path.name} is turned by its EXIF tag", "make sure boxes are those of the upright image"
        remarks.append(Problem(sample, "image_path", problem, remedy, "warning"))
    if facts.width * facts.height > HUGE_PIXELS:
        problem, remedy = f"{path.name} has {facts.width} x {facts.height} pixels", "scale it down; models do anyway"
        remarks.append(Problem(sample, "image_path", problem, remedy, "warning"))
    if facts.mode not in _USUAL_MODES:
        problem, remedy = f"{path.name} has colour mode {facts.mode}", "look at it as converted (data/images.py)"
        remarks.append(Problem(sample, "image_path", problem, remedy, "note"))
    return remarks


def _size(size: tuple[int, int] | None) -> str:
    return "–" if size is None else f"{size[0]} x {size[1]}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "–"
