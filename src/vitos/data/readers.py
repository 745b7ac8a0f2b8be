"""Record files → `Record`s: the JSON format of the paper's release, validated field by field.

A file is a JSON array (`.json`) or has one object per line (`.jsonl`). Fields of a record:

| field | value |
| --- | --- |
| `image_path` | path, or list of paths, relative to the file's folder and staying below it |
| `slices` | optional: `image_path` is a series or a volume, of which these slices are used (`data/slices.py`) |
| `question` | text with inline options and one `<image>` for each image (may be left out for one image and a series) |
| `answer` | the letter of the right option, or as `kind` says; a list of texts for `kind: list` |
| `kind` | optional: `letter` (default), `word`, `number`, `list` or `text` (`vitos.core.answers`) |
| `accepted` | optional: a list of further answers that are as right; not for letters |
| `tolerance` | optional, for numbers: how far an answer may be off, `"2 mm"` or `"10 %"` |
| `bbox` | optional: evidence, a list of boxes in 0..1 (`data/evidence.py`); null and [] mean unknown |
| `id` | optional: unique text; otherwise `<file stem>/<index>` |
| `meta`, `template` | optional: an object of text fields; `template` is short for `meta.template` |

A `meta.json` in the same folder, a list of {"split", "index", "template", …}, gives templates to records without one.
Any other field is an error, because a misspelt `bbox` must not become a record without evidence.

`iter_entries` is the only place where records are validated: `read_records` raises its first error,
`check_dataset` collects them all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitos.core.record import IMAGE_PLACEHOLDER, Record
from vitos.data.evidence import parse_evidence
from vitos.data.fields import Report, is_broken
from vitos.data.fields import show as show
from vitos.data.gold import parse_gold
from vitos.data.images import DataError, ImageError, resolve_under
from vitos.data.names import half_character, same_name
from vitos.data.picture import parse_selector, split_name
from vitos.data.series import Series, open_series
from vitos.data.slices import FORMS

META_FILE = "meta.json"
HUB_PREFIX = "hub:"
Severity = Literal["error", "warning", "note"]

_REQUIRED = ("image_path", "question", "answer")
_FIELDS = (*_REQUIRED, "slices", "kind", "accepted", "tolerance", "bbox", "id", "meta", "template")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a data set.

    Attributes:
        sample: the file and the index in it, or the file.
        field: the field of the record.
        problem: what is wrong, as the end of a sentence.
        remedy: what to do.
        severity: errors stop training, warnings and notes do not.
    """

    sample: str
    field: str
    problem: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.sample}, {self.field}: {self.problem}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a file as validated: a record, or the problems for which there is none.

    Attributes:
        sample: how problems name it.
        images: the images that exist, even if there is no record.
        is_item: False for problems of a whole file.
    """

    sample: str
    record: Record | None
    images: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = ()
    is_item: bool = True


def read_records(source: str | Path, *, split: str | None = None, limit: int | None = None) -> list[Record]:
    """All records of a file, in its order.

    >>> import json
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> row = {"image_path": "1.png", "question": "What is shown? A. cyst B. nodule", "answer": "B"}
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("RGB", (64, 64)).save(f"{folder}/1.png")
    ...     size = Path(folder, "test.json").write_text(json.dumps([row]))
    ...     (record,) = read_records(f"{folder}/test.json")
    >>> record.id, record.question
    ('test/0', '<image>What is shown? A. cyst B. nodule')

    Args:
        source: a `.json` or `.jsonl` file, or a folder that holds `<split>.json` (or one record file only).
        split: the file of a folder; for a file, the name of the split in `meta.json` (by default the file's stem).
        limit: read the first `limit` records only.

    Raises:
        DataError: at the first record that is not valid, naming file, index and field; for parquet and hub sources,
            with the command that converts them.
    """
    files = record_files(source, split)
    if len(files) > 1:
        names = ", ".join(file.stem for file in files)
        raise DataError(f"{source} holds several splits ({names}); name one of them as split")
    records = []
    for entry in iter_entries(files[0], split=split, limit=limit):
        if entry.problems:
            raise DataError(str(entry.problems[0]))
        if entry.record is not None:
            records.append(entry.record)
    return records


def record_files(source: str | Path, split: str | None = None) -> list[Path]:
    """The record files that `source` names: itself, or those of a folder (`<split>.json[l]`, or all of them).

    Raises:
        DataError: if there is none, or `source` has to be converted first.
    """
    path = Path(source)
    if str(source).startswith(HUB_PREFIX) or path.suffix == ".parquet":
        raise _needs_conversion(source)
    if path.is_file():
        if path.suffix not in (".json", ".jsonl"):
            raise DataError(f"{path}: records are read from .json and .jsonl files; rename or convert it")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; check the path (a hub data set is written hub:owner/name)")
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl") and file.name != META_FILE)
    if not files and any([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
        raise _needs_conversion(source)
    chosen = [file for file in files if split is None or same_name(file.stem, split)]
    if not chosen:
        there = ", ".join(file.name for file in files) or "no record file"
        raise DataError(f"{path} holds no {split or '*'}.json or .jsonl (there: {there}); check the split's name")
    if split is not None and len(chosen) > 1:
        raise DataError(f"{path} holds {split}.json and {split}.jsonl; remove one or name the file")
    return chosen


def iter_entries(file: Path, *, split: str | None = None, limit: int | None = None) -> Iterator[Entry]:
    """Validate a record file item by item; an unreadable file is an entry whose `sample` is the file's name.

    Raises:
        ValueError: if `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    split = split or file.stem
    if half_character(str(file.absolute())) is not None:
        yield _file_entry(show(file.name), "file", "has a path that is no UTF-8", "rename the file or its folder")
        return
    templates, problems = _read_templates(file.parent / META_FILE, split)
    if problems:
        yield Entry(META_FILE, None, problems=problems, is_item=False)
    seen: dict[str, str] = {}
    count = 0
    for index, raw in enumerate(_read_items(file)):
        if index == limit:
            return
        count += 1
        if isinstance(raw, Problem):
            yield Entry(raw.sample, None, problems=(raw,))
        else:
            yield parse_entry(
                raw,
                sample=f"{file.name}[{index}]",
                default_id=f"{file.stem}/{index}",
                root=file.parent,
                template=templates.get(index),
                seen=seen,
            )
    if count == 0:
        yield _file_entry(file.name, "file", "holds no records", "write at least one")
    if templates and max(templates) >= count:
        problem = f"has a row for {split} {max(templates)}, but {file.name} ends at {count - 1}"
        yield _file_entry(META_FILE, "index", problem, "the two files are of different versions; get both again")


def parse_entry(
    raw: object, *, sample: str, default_id: str, root: Path, seen: dict[str, str], template: str | None = None
) -> Entry:
    """Validate one item of the record format and collect every problem in it.

    Args:
        raw: the item as decoded from JSON.
        sample: how problems name it.
        default_id: its id if it has none.
        root: the folder that image paths are relative to.
        seen: ids so far → sample; this one is added.
        template: `meta.template` if the item gives none.
    """
    problems: list[Problem] = []

    def report(field: str, problem: str, remedy: str) -> None:
        problems.append(Problem(sample, field, problem, remedy))

    if not isinstance(raw, dict):
        report("record", f"is {show(raw)}, not an object", f"write an object with {', '.join(_REQUIRED)}")
        return Entry(sample, None, problems=tuple(problems))
    for name in _REQUIRED:
        if name not in raw:
            report(name, "is missing", "add it")
    for name in raw:
        if name not in _FIELDS:
            report(show(name), "is no field of a record", f"remove it, move it into meta, or spell it as in {_FIELDS}")

    volume, series = "slices" in raw, None
    names, images = _parse_images(raw.get("image_path"), root, report, volume) if "image_path" in raw else ([], ())
    if volume:
        series = _parse_series(raw["slices"], images, root, report) if images else None
        images = series.paths if series else ()
    placed = _with_slices(raw.get("question"), series, report) if volume else raw.get("question")
    count = len(images) if volume else len(names)
    question = _parse_question(placed, count, report) if "question" in raw else ""
    gold = parse_gold(raw, question, report)
    boxes = None if volume and series is None else parse_evidence(raw.get("bbox"), images, series, report)
    meta = _parse_meta(raw.get("meta", {}), raw.get("template"), template, report)

    identity = raw.get("id", default_id)
    if not isinstance(identity, str) or not identity.strip() or not identity.isprintable():
        report("id", f"is {show(identity)}, not a printable text", "write a unique text or leave it out")
    elif identity in seen:
        report("id", f"{show(identity)} is also the id of {seen[identity]}", "make ids unique or leave them out")
    else:
        seen[identity] = sample
    record = None
    if not problems:
        record = Record(identity, images, question, gold.answer, boxes, meta, gold.kind, gold.accepted, gold.tolerance)
    return Entry(sample, record, images, tuple(problems))


def _parse_images(raw: object, root: Path, report: Report, volume: bool) -> tuple[list[str], tuple[Path, ...]]:
    """The names in `image_path`, and the paths of those that exist below `root`; of a volume a folder as well."""
    names = [raw] if isinstance(raw, str) else raw
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        report("image_path", f"is {show(raw)}, not a path or a list of paths", 'write ["images/name.png"]')
        return [], ()
    images = []
    for name in names:
        if is_broken("image_path", name, report):
            continue
        try:
            path = resolve_under(root, name)
            file, selector = split_name(path)
            parse_selector(selector, volume=volume)
            if file.is_file() or (volume and file.is_dir()):
                images.append(path)
            elif file.is_dir():
                report("image_path", f"{show(name)} is a folder", f'name a file, or add "slices": {FORMS}')
            else:
                report("image_path", f"there is no file {show(name)}", f"put it below {root} or correct the path")
        except DataError as error:
            report("image_path", "is no path below the data set's folder", str(error))
        except ValueError as error:
            report("image_path", f"{show(name)}: {error}", "write the selector as docs/data.md says")
        except OSError as error:  # such as a name longer than the file system allows
            report("image_path", f"{show(name)} cannot be read ({error.strerror})", "correct the path")
    return names, tuple(images)


def _parse_series(rule: object, paths: Sequence[Path], root: Path, report: Report) -> Series | None:
    """The slices of the volume that `image_path` names."""
    if not isinstance(rule, str):
        report("slices", f"is {show(rule)}, not a text", f"write {FORMS}")
        return None
    try:
        series = open_series(paths, rule)
    except ImageError as error:
        report("slices", error.reason, f"it is about {error.path.name}")
        return None
    if outside := [path for path in series.paths if not split_name(path)[0].resolve().is_relative_to(root.resolve())]:
        report(
            "image_path", f"{show(outside[0].name)} is a symlink out of the data set's folder", "copy the file there"
        )
        return None
    return series


def _with_slices(raw: object, series: Series | None, report: Report) -> object:
    """The question behind the numbered slices."""
    if not isinstance(raw, str) or series is None or not raw.strip():
        return raw
    if IMAGE_PLACEHOLDER in raw:
        report("question", f"has {IMAGE_PLACEHOLDER} in a record with slices", "leave it out; the slices go in front")
        return raw
    return series.lead + raw


def _parse_question(raw: object, images: int, report: Report) -> str:
    """The question with one placeholder for each of its `images`; unchecked where these are not known (0)."""
    if not isinstance(raw, str) or not raw.replace(IMAGE_PLACEHOLDER, "").strip():
        report("question", f"is {show(raw)}, not a question", "write text")
        return ""
    if is_broken("question", raw, report):
        return raw
    placeholders = raw.count(IMAGE_PLACEHOLDER)
    if placeholders == 0 and images == 1:
        return IMAGE_PLACEHOLDER + raw
    if images and placeholders != images:
        problem = f"has {placeholders} {IMAGE_PLACEHOLDER} for {images} image(s)"
        report("question", problem, f"write one {IMAGE_PLACEHOLDER} for each image")
    return raw


def _parse_meta(meta: object, own: object, fallback: str | None, report: Report) -> dict[str, str]:
    """`meta` with the record's `own` template, or else with the `fallback` of meta.json."""
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        report("meta", f"is {show(meta)}, not an object of texts", "write texts only")
        return {}
    for text in (*meta, *meta.values()):
        is_broken("meta", text, report)
    if own is not None and not isinstance(own, str):
        report("template", f"is {show(own)}, not a text", "write the template's name")
        return meta
    if own is not None and meta.get("template", own) != own:
        report("template", f"is {show(own)}, but meta.template is {show(meta['template'])}", "keep one of them")
    template = fallback if own is None else own
    if template is not None:
        is_broken("template", template, report)
    return meta if template is None else {"template": template} | meta


def _read_items(file: Path) -> Iterator[object]:
    """The decoded items of a record file; a `Problem` for a line or file that cannot be decoded."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _decode(line, file.name, f"line {number}")
                return
            items = _decode(lines.read(), file.name, "file")
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(file.name, "file", f"cannot be read: {error}", "it must be a readable UTF-8 text")
        return
    if isinstance(items, Problem):
        yield items
    elif isinstance(items, list):
        yield from items
    else:
        yield Problem(file.name, "file", f"holds {show(items)}, not an array", "write a JSON array of records")


def _decode(text: str, sample: str, field: str) -> object:
    """The JSON value of `text`, or the `Problem` for which there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem(sample, field, f"is not JSON: {error}", "correct it, or export it again")


def _read_templates(file: Path, split: str) -> tuple[dict[int, str], tuple[Problem, ...]]:
    """Index → template of the rows of `split` in a `meta.json`; nothing where there is no such file."""
    if not file.is_file():
        return {}, ()
    templates: dict[int, str] = {}
    for number, row in enumerate(_read_items(file)):
        if isinstance(row, Problem):
            return {}, (row,)
        where = f"{file.name}[{number}]"
        row = row if isinstance(row, dict) else {}
        name, index, template = row.get("split"), row.get("index"), row.get("template")
        if not isinstance(name, str) or type(index) is not int or index < 0 or not isinstance(template, str):
            problem = "is no object with split (text), index (number from 0) and template (text)"
            return {}, (Problem(where, "row", problem, f"correct it, or move {file.name} away if it is another's"),)
        if same_name(name, split):
            if index in templates:
                return {}, (Problem(where, "index", f"{split} {index} has a second row", "keep one of them"),)
            templates[index] = template
    return templates, ()


def _file_entry(sample: str, field: str, problem: str, remedy: str) -> Entry:
    return Entry(sample, None, problems=(Problem(sample, field, problem, remedy),), is_item=False)


def _needs_conversion(source: str | Path) -> DataError:
    name = str(source)
    target = Path(name.removeprefix(HUB_PREFIX)).stem + "-json"
    command = shlex.join(["vitos", "data", "convert", name, target, "--to", "json"])
    return DataError(
        f"{name}: images inside parquet are written out before use; run\n    {command}\nand read {target}"
    )
