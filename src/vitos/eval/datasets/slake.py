"""SLAKE: bilingual questions about radiology images (`BoKelvin/SLAKE`).

`<split>.json`, an array of objects with `img_name` (`xmlab102/source.jpg`), `question`, `answer`, `answer_type`
(CLOSED or OPEN), `q_lang` (en or zh), `location`, `modality`, `base_type`, `content_type`, `triple`, `qid`, `img_id`;
the images in a folder `imgs/` or in `imgs.zip`.

Closed questions have yes or no, or one of two things that the question names ("Which is bigger, …?"): the latter have
no options here and ask for the word. Chinese ones are asked like English ones, also for the word: 是的 is not 是.

Verified: the files, `imgs/` below the folder, the fields by three programs that read them. Not verified: that
`imgs.zip` holds `imgs/` (both that and the bare content are read).
"""

from __future__ import annotations

from pathlib import Path

from vitos.core.record import AnswerKind
from vitos.eval.datasets.loading import Benchmark, Release, register
from vitos.eval.datasets.questions import ParsedRow, yes_no_or
from vitos.eval.datasets.rows import ReleaseRow, RowError, find, json_rows, labels, text_of


def _release(folder: Path, split: str) -> Release:
    return Release(json_rows(folder, find(folder, f"{split}.json")), sorted(folder.glob("imgs.zip")), ("imgs", ""))


def _question(row: ReleaseRow) -> ParsedRow:
    text, answer, answer_type = (text_of(row, name) for name in ("question", "answer", "answer_type"))
    kind: AnswerKind
    if answer_type.upper() == "CLOSED":
        text, answer, kind = yes_no_or("word", text, answer)
    elif answer_type.upper() == "OPEN":
        kind = "text"
    else:
        raise RowError(f"answer_type is {answer_type[:40]!r}, neither CLOSED nor OPEN")
    columns = {"question_type": "content_type", "modality": "modality", "subset": "q_lang", "location": "location"}
    meta = labels(row, **columns) | {"answer_type": answer_type.upper()}
    return ParsedRow(text=text, images=(text_of(row, "img_name"),), answer=answer, kind=kind, meta=meta)


BENCHMARK = register(
    Benchmark(
        name="slake",
        hub="BoKelvin/SLAKE",
        files=lambda split: [f"{split}.json", "imgs.zip"],
        splits=("test", "validation", "train"),
        release=_release,
        question=_question,
    )
)
