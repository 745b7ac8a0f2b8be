"""OmniMedVQA, open-access part: 88,996 choices over 42 data sets and eight modalities (`foreverbeliever/OmniMedVQA`).

One archive, `OmniMedVQA.zip`, read packed or unpacked. In it, `OmniMedVQA/QA_information/Open-access/<set>.json`,
arrays of objects with `dataset`, `question_id`, `question_type`, `question`, `gt_answer` (the text of an option),
`image_path` (`Images/…`, below `OmniMedVQA/`), `option_A` … `option_D` (not all in every row) and `modality_type`
(one file says `modality`). The restricted-access part has no images in the release and is not read.

Verified by four programs that read it; the counts and the one `modality` by a report on its content.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vitos.data.archive import Archive
from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, with_options
from vitos.eval.datasets.rows import NamedRow, ReleaseRow, find, json_array, json_rows, labels, text_of

_ARCHIVE = "OmniMedVQA.zip"
_INSIDE = ("", "OmniMedVQA")
_QUESTIONS = "QA_information/Open-access"


def _release(folder: Path, split: str) -> Release:
    if not (folder / _ARCHIVE).is_file():
        files = find(folder, *(f"{inside}/{_QUESTIONS}/*.json".lstrip("/") for inside in _INSIDE))
        return Release(json_rows(folder, files), (), _INSIDE)
    return Release(_archived(folder / _ARCHIVE), (folder / _ARCHIVE,), _INSIDE)


def _archived(path: Path) -> Iterator[NamedRow]:
    with Archive(path) as archive:
        for name in sorted(archive.names):
            if f"/{_QUESTIONS}/" in f"/{name}" and name.endswith(".json"):
                yield from json_array(name, archive.read(name))


def _question(row: ReleaseRow) -> ParsedRow:
    options = [row.get(f"option_{place}") for place in "ABCD"]
    text, answer = with_options(text_of(row, "question"), options, answer=text_of(row, "gt_answer"))
    meta = labels(row, question_type="question_type", modality="modality_type", subset="dataset")
    meta = labels(row, modality="modality") | meta
    return ParsedRow(text=text, images=(text_of(row, "image_path"),), answer=answer, kind="letter", meta=meta)


BENCHMARK = register(
    Benchmark(
        name="omnimedvqa",
        hub="foreverbeliever/OmniMedVQA",
        files=lambda split: [_ARCHIVE],
        splits=("test",),
        release=_release,
        question=_question,
    )
)
