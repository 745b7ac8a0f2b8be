"""Everything that is wrong with data sets, in one pass and before anything is trained on them.

Errors are what `read_records` and `load_image` would refuse, and options that can be read in more than one way; a data
set with errors is not trained on. Warnings are probably wrong, notes only worth knowing. What several files share is
looked for in `data/leaks.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vitos.core.record import Record, option_problems
from vitos.data.images import DataError, ImageError
from vitos.data.leaks import Use, find_leaks
from vitos.data.looks import Look, look_at
from vitos.data.readers import Problem, Severity, iter_entries, record_files

HUGE_PIXELS = 16_000_000
DARK = 32  # gray levels of 255 below which nothing can be seen
_THREADS = 4
_USUAL_MODES = ("RGB", "L", "MONOCHROME1", "MONOCHROME2", "int16", "uint16")
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Problems and figures of a data set; figures count valid records only.

    Attributes:
        source: the file or folder checked.
        problems: those of records in the order of the files, then those of images, then what splits share.
        items: number of items in the files, valid or not.
        records: number of valid records.
        images: number of distinct image files that the items name.
        templates: `meta.template` → number of records.
        answers: letter → number of records; answers in words are counted by their kind.
        boxes: number of evidence boxes.
        evidence_share: the median over records with boxes of the sum of their areas, in 0..1 of the image; or None.
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
    return check_datasets([source], progress=progress)[0]


def check_datasets(
    sources: Sequence[str | Path],
    *,
    splits: Sequence[str] | None = None,
    loaded: Mapping[str, Sequence[Record]] | None = None,
    progress: Progress | None = None,
) -> list[CheckReport]:
    """`check_dataset` of several sources, and what they share: images and questions that are in two splits.

    Args:
        sources: as for `read_records`.
        splits: the split of each source and then of each of `loaded`, such as "train" and "eval"; None: every file is
            a split for itself.
        loaded: name → records that were read already, such as a benchmark's.
        progress: as for `check_dataset`, over the images of all sources.

    Returns:
        A report for each source, then for each of `loaded`. What is shared is told where it comes up the second time.

    Raises:
        DataError: only if a source names no record file at all.
    """
    uses, problems, items = _read_all(sources, splits)
    for name, records in (loaded or {}).items():
        split = name if splits is None else splits[len(items)]
        uses += [Use(source=len(items), split=split, sample=r.id, images=r.image_paths, record=r) for r in records]
        problems.append([])
        items.append(len(records))
    names = [*map(str, sources), *(loaded or {})]
    images = _look_at_all(list(dict.fromkeys(path for use in uses for path in use.images)), progress)
    looks = {path: look for path, look in images.items() if isinstance(look, Look)}
    own = [[use for use in uses if use.source == number] for number in range(len(names))]
    for number in range(len(names)):
        problems[number].extend(_problems_of_images(own[number], images))
    for number, problem in find_leaks(uses, looks):
        problems[number].append(problem)
    return [_report(name, problems[number], items[number], own[number], looks) for number, name in enumerate(names)]


def _read_all(
    sources: Sequence[str | Path], splits: Sequence[str] | None
) -> tuple[list[Use], list[list[Problem]], list[int]]:
    """All items, and for each source its problems and its number of items."""
    files = [(number, file) for number, source in enumerate(sources) for file in record_files(source)]
    names = Counter(file.name for _, file in files)
    uses: list[Use] = []
    problems: list[list[Problem]] = [[] for _ in sources]
    items = [0] * len(sources)
    for number, file in files:
        # Two files of one name are told apart by their folders.
        label = file.name if names[file.name] == 1 else str(file)
        split = splits[number] if splits is not None else label
        for entry in iter_entries(file):
            items[number] += entry.is_item
            problems[number].extend(entry.problems)
            lettered = entry.record if entry.record is not None and entry.record.kind == "letter" else None
            doubts = option_problems(lettered.question) if lettered is not None else ()
            once = "write each option once, on one line of its own"
            problems[number] += [Problem(entry.sample, "question", doubt, once) for doubt in doubts]
            if lettered is not None and not doubts and not lettered.options:
                problem, remedy = "no options were found in it", "write them as A. … B. … if it has any"
                problems[number].append(Problem(entry.sample, "question", problem, remedy, "warning"))
            sample = entry.sample.replace(file.name, label, 1)
            uses.append(Use(source=number, split=split, sample=sample, images=entry.images, record=entry.record))
    return uses, problems, items


def _problems_of_images(uses: Sequence[Use], images: Mapping[Path, Look | ImageError]) -> Iterator[Problem]:
    """What is wrong with or unusual about the images of a source, each told once."""
    users = {path: use.sample for use in reversed(uses) for path in use.images}
    same: dict[str, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(path for use in uses for path in use.images):
        look = images[path]
        if isinstance(look, ImageError):
            yield Problem(users[path], "image_path", f"{path.name}: {look.reason}", "replace it")
        else:
            same[look.shown].append(path)
            yield from _remarks(users[path], path, look)
    for paths in same.values():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths[:5])
            problem, remedy = f"{len(paths)} files show the same picture: {names}", "keep one of them"
            yield Problem(users[paths[0]], "image_path", problem, remedy, "note")


def _report(
    source: str, problems: Sequence[Problem], items: int, uses: Sequence[Use], looks: Mapping[Path, Look]
) -> CheckReport:
    records = [use.record for use in uses if use.record is not None]
    paths = dict.fromkeys(path for use in uses for path in use.images)
    sizes = [(looks[path].facts.width, looks[path].facts.height) for path in paths if path in looks]
    shares = [sum(box.area for box in record.boxes) for record in records if record.boxes]
    return CheckReport(
        source=source,
        problems=tuple(problems),
        items=items,
        records=len(records),
        images=len(paths),
        templates=Counter(record.meta["template"] for record in records if "template" in record.meta),
        answers=dict(sorted(Counter(r.answer if r.kind == "letter" else r.kind for r in records).items())),
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


def _look_at_all(paths: Sequence[Path], progress: Progress | None) -> dict[Path, Look | ImageError]:
    """Path → what the picture is known by, or the reason why it cannot be used; decoded in a few threads."""
    results: dict[Path, Look | ImageError] = {}
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for path, result in zip(paths, pool.map(_try_look, paths), strict=True):
            results[path] = result
            if progress is not None:
                progress(len(results), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # or Ctrl-C would wait for every image
    return results


def _try_look(path: Path) -> Look | ImageError:
    try:
        return look_at(path)
    except ImageError as error:
        return error


def _remarks(sample: str, path: Path, look: Look) -> Iterator[Problem]:
    """What is unusual about an image that can be used."""
    facts, warned = look.facts, [(text, "see docs/data.md") for text in look.facts.warnings]
    if facts.rotated:
        warned.append(("is turned by its EXIF tag", "make sure boxes are those of the upright image"))
    if facts.width * facts.height > HUGE_PIXELS:
        warned.append((f"has {facts.width} x {facts.height} pixels", "scale it down; models do anyway"))
    if look.flat:
        warned.append(("shows one colour only", "look at it; if it should not, name a window or export it again"))
    elif look.brightest < DARK:
        warned.append((f"is nearly black ({look.brightest} of 255 at most)", "look at it, or name a window"))
    for problem, remedy in warned:
        yield Problem(sample, "image_path", f"{path.name}: {problem}", remedy, "warning")
    if facts.mode not in _USUAL_MODES:
        problem, remedy = f"{path.name}: has colour mode {facts.mode}", "look at it as converted (data/modes.py)"
        yield Problem(sample, "image_path", problem, remedy, "note")


def _size(size: tuple[int, int] | None) -> str:
    return "–" if size is None else f"{size[0]} x {size[1]}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "–"
