"""The bundle on which HuatuoGPT-Vision's line of work evaluates.

On the hub `FreedomIntelligence/Medical_Multimodal_Evaluation_Data`.
One array, `medical_multimodel_evaluation_data.json`, of 17,303 objects with `question`, `image` (a list of paths,
`images/…`), `options` (a list of texts), `answer` (the text of an option), `dataset` (the benchmark it comes from) and
`subset` (for OmniMedVQA its modality); the images in `images/`, as it is or in `images.zip`. All questions have
options here, also those of VQA-RAD, SLAKE and PathVQA, so its accuracies are not those of the original releases.

Verified: the file's name, `image`, `options`, `answer`, `dataset` and `subset`, by three programs that read them. Not
verified: the count, and the folder inside `images.zip`.
"""

from __future__ import annotations

from pathlib import Path

from vitos.core.record import AnswerKind
from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, with_options, yes_no_or
from vitos.eval.datasets.rows import ReleaseRow, RowError, find, json_rows, labels, text_of

_FILE = "medical_multimodel_evaluation_data.json"


def _release(folder: Path, split: str) -> Release:
    return Release(json_rows(folder, find(folder, _FILE)), sorted(folder.glob("images.zip")), ("", "images"))


def _question(row: ReleaseRow) -> ParsedRow:
    images, options = row.get("image"), row.get("options") or []
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise RowError("image is not a list of paths")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise RowError("options are not a list of texts")
    text, answer = text_of(row, "question"), text_of(row, "answer")
    kind: AnswerKind = "letter"
    if options:
        text, answer = with_options(text, options, answer=answer)
    else:
        text, answer, kind = yes_no_or("text", text, answer)
    meta = labels(row, subset="dataset", part="subset")
    if meta.get("subset", "").startswith("OmniMedVQA"):
        meta |= labels(row, modality="subset")
    return ParsedRow(text=text, images=tuple(images), answer=answer, kind=kind, meta=meta)


BENCHMARK = register(
    Benchmark(
        name="medical_bundle",
        hub="FreedomIntelligence/Medical_Multimodal_Evaluation_Data",
        files=lambda split: [_FILE, "images.zip"],
        splits=("test",),
        release=_release,
        question=_question,
    )
)
