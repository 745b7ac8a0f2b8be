"""Small copies of public releases: their columns, folders and archives, with made-up rows and generated images.

Each `write_…` fills a folder as the hub would, ugly rows included, and returns what a loader has to find there: the
usable questions as (question, answer, kind, images), in order, and the reasons of those that are left out.
"""

import csv
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass
class Expected:
    """Rows as a loader has to read them."""

    good: list[tuple[str, str, str, int]]
    bad: list[str]


def picture(seed: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> bytes:
    """An image file of noise; `mode` also L, and I;16 as 16-bit TIFF or PNG."""
    rng = np.random.default_rng(seed)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    values = rng.integers(0, 65536 if mode == "I;16" else 256, shape)
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8)).save(file, kind)
    return file.getvalue()


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def image(seed: int, **kind) -> dict:
    return {"bytes": picture(seed, **kind), "path": None}


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    types = {name: IMAGE if name.startswith("image") else pa.string() for name in columns}
    table = pa.Table.from_pylist(rows, pa.schema(list(types.items())))
    pq.write_table(table, path, row_group_size=row_group_size)


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def yes_no(question: str) -> str:
    return f"<image>{question}\nA. yes\nB. no"


def write_vqa_rad(folder: Path, split: str = "test", shard: str = "data/test-00000-of-00001-abc.parquet") -> Expected:
    rows = [
        {"image": image(1), "question": "are regions of the brain infarcted?", "answer": "yes"},
        {"image": image(2, kind="JPEG", mode="L"), "question": "Is this normal?", "answer": "No"},
        {"image": image(3, kind="TIFF", mode="I;16"), "question": "where is it?", "answer": "left lower lobe"},
        {"image": {"bytes": truncated(picture(4)), "path": None}, "question": "Is it cut?", "answer": "yes"},
        {"image": {"bytes": b"no image", "path": None}, "question": "Is it one?", "answer": "yes"},
        {"image": None, "question": "Is it there?", "answer": "yes"},
        {"image": image(1), "question": " ", "answer": "yes"},
        {"image": image(1), "question": "What is it?", "answer": None},
        {"image": image(1), "question": "And the same image?", "answer": "yes."},
    ]
    write_parquet(folder / shard, rows)
    return Expected(
        [
            (yes_no("are regions of the brain infarcted?"), "A", "letter", 1),
            (yes_no("Is this normal?"), "B", "letter", 1),
            ("<image>where is it?", "left lower lobe", "text", 1),
            (yes_no("And the same image?"), "A", "letter", 1),
        ],
        ["truncated", "not an image", "holds no image", "question is no text", "answer is no text"],
    )


def write_path_vqa(folder: Path) -> Expected:
    first = write_vqa_rad(folder, shard="data/test-00000-of-00002-abc.parquet")
    second = write_vqa_rad(folder, shard="data/test-00001-of-00002-def.parquet")
    return Expected(first.good + second.good, first.bad + second.bad)


def slake_row(number: int, name: str, question: str, answer: str, answer_type: str, lang: str = "en", **more) -> dict:
    fixed = {"img_id": number, "location": "Lung", "modality": "CT", "base_type": "vqa", "content_type": "Organ"}
    row = {"img_name": name, "question": question, "answer": answer, "q_lang": lang, "answer_type": answer_type}
    return fixed | row | {"triple": ["vhead", "_", "_"], "qid": 1000 + number} | more


def write_slake(folder: Path, unpacked: bool = False) -> Expected:
    images = {"imgs/xmlab1/source.jpg": picture(1, "JPEG"), "imgs/xmlab2/source.jpg": picture(2, "JPEG", "L")}
    images["imgs/xmlab3/source.jpg"] = truncated(picture(3, "JPEG", size=(64, 64)))
    rows = [
        slake_row(1, "xmlab1/source.jpg", "Is this a CT?", "Yes", "CLOSED"),
        slake_row(1, "xmlab1/source.jpg", "Which is bigger, liver or spleen?", "Liver", "CLOSED "),
        slake_row(2, "xmlab2/source.jpg", "What organ is it?", "Left Lung", "OPEN"),
        slake_row(2, "xmlab2/source.jpg", "图中有肺吗？", "有", "CLOSED", "zh"),
        slake_row(2, "xmlab2/source.jpg", "图像是什么模态？", "核磁共振", "OPEN", "zh", modality=None),
        slake_row(2, "xmlab2/source.jpg", "Is there an answer in an open one?", "Yes", "OPEN"),
        slake_row(3, "xmlab3/source.jpg", "Is it cut?", "Yes", "CLOSED"),
        slake_row(4, "xmlab4/source.jpg", "Is it there?", "Yes", "CLOSED"),
        slake_row(5, "../../secret.jpg", "Is it outside?", "Yes", "CLOSED"),
        slake_row(5, "/etc/secret.jpg", "Is it outside?", "Yes", "CLOSED"),
        slake_row(1, "xmlab1/source.jpg", "Is it one?", "Yes", "MAYBE"),
        slake_row(5, "x" * 5000, "Is it long?", "Yes", "CLOSED"),
        "no object",
    ]
    (folder / "test.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    if unpacked:
        for name, data in images.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(data)
    else:
        write_zip(folder / "imgs.zip", {"imgs/": b"", **images})
    return Expected(
        [
            (yes_no("Is this a CT?"), "A", "letter", 1),
            ("<image>Which is bigger, liver or spleen?", "Liver", "word", 1),
            ("<image>What organ is it?", "Left Lung", "text", 1),
            ("<image>图中有肺吗？", "有", "word", 1),
            ("<image>图像是什么模态？", "核磁共振", "text", 1),
            ("<image>Is there an answer in an open one?", "Yes", "text", 1),
        ],
        [
            *("truncated", "no image 'xmlab4", "'..'", "absolute path", "neither CLOSED nor OPEN"),
            *("cannot be read", "not a JSON object"),
        ],
    )


def pmc_row(index: int, figure: str, question: str, choices: tuple[str, str, str, str], answer: str) -> dict:
    listed = {f"Choice {letter}": choice for letter, choice in zip("ABCD", choices, strict=True)}
    row = {"index": index, "Figure_path": figure, "Caption": "Figure 1, a\n caption.", "Question": question}
    return row | listed | {"Answer": answer, "split": "test"}


def write_pmc_vqa(folder: Path) -> Expected:
    lettered = (" A:CT ", " B:MRI ", " C:X-ray, plain ", " D:PET ")
    rows = [
        pmc_row(0, "PMC1_F1.jpg", " What is shown? ", lettered, "B"),
        pmc_row(1, "PMC1_F2.jpg", "Which agent?", ("E. coli", "S. aureus", "C. difficile", "None"), "C"),
        pmc_row(2, "PMC1_F2.jpg", "Which one?", (" A:left", " B:", " C:right", " D: "), "C"),
        pmc_row(3, "PMC1_F2.jpg", "Which group?", ("A:B", "B:A", "C:AB", "D:0"), "A"),
        pmc_row(4, "PMC1_F2.jpg", "Which one?", lettered, "E"),
        pmc_row(5, "PMC1_F2.jpg", "Which one?", (" A:left", "", "", ""), "A"),
        pmc_row(6, "PMC1_F9.jpg", "Which one?", lettered, "A"),
    ]
    write_csv(folder / "test_2.csv", rows)
    write_zip(folder / "images_2.zip", {"figures/PMC1_F1.jpg": picture(1), "figures/PMC1_F2.jpg": picture(2, "JPEG")})
    return Expected(
        [
            ("<image>What is shown?\nA. CT\nB. MRI\nC. X-ray, plain\nD. PET", "B", "letter", 1),
            ("<image>Which agent?\nA. E. coli\nB. S. aureus\nC. C. difficile\nD. None", "C", "letter", 1),
            ("<image>Which one?\nA. left\nB. right", "B", "letter", 1),
            ("<image>Which group?\nA. B\nB. A\nC. AB\nD. 0", "A", "letter", 1),
        ],
        ["letter of no option", "has 1 options", "no image 'PMC1_F9.jpg'"],
    )


def write_pmc_vqa_1(folder: Path) -> Expected:
    """Version 1: the answer as text, the letter in another column."""
    choices = {f"Choice {letter}": f" {letter}:{word} " for letter, word in zip("ABCD", "wxyz", strict=True)}
    row = {"Figure_path": "PMC1_F1.jpg", "Question": "Which?", "Answer": "y", **choices, "Answer_label": "C"}
    write_csv(folder / "test_clean.csv", [row])
    write_zip(folder / "images.zip", {"images/PMC1_F1.jpg": picture(1)})
    return Expected([("<image>Which?\nA. w\nB. x\nC. y\nD. z", "C", "letter", 1)], [])


def omni_row(number: int, question: str, options: dict, answer: str, path: str, **more) -> dict:
    row = {"dataset": "Blood Cell", "question_id": f"Blood_{number}", "question_type": "Modality Recognition"}
    listed = {f"option_{letter}": text for letter, text in options.items()}
    modality = {} if "modality" in more else {"modality_type": "Microscopy Images"}
    return row | {"question": question, "gt_answer": answer, "image_path": path} | listed | modality | more


def write_omnimedvqa(folder: Path, unpacked: bool = False) -> Expected:
    blood = [
        omni_row(
            1, "What is it?", dict(zip("ABCD", ("CT", "MR", "PET", "X-ray"), strict=True)), "X-ray", "Images/a.png"
        ),
        omni_row(2, "Normal?", {"A": "No, it's ill", "B": "Yes"}, "yes.", "Images/b.tif"),
        omni_row(3, "Gap?", {"A": "one", "B": None, "C": "three", "D": ""}, "three", "Images/b.tif"),
        omni_row(4, "None?", {"A": "one", "B": "two"}, "three", "Images/a.png"),
        omni_row(5, "Twice?", {"A": "one", "B": "one", "C": "two"}, "one", "Images/a.png"),
    ]
    chest = [omni_row(6, "Which?", {"A": "CT", "B": "MR"}, "CT", "Images/a.png", dataset="Chest CT", modality="CT")]
    files = {
        "QA_information/Open-access/Blood Cell.json": json.dumps(blood).encode(),
        "QA_information/Open-access/Chest CT Scan.json": json.dumps(chest).encode(),
        "QA_information/Restricted-access/Other.json": json.dumps(blood).encode(),
        "Images/a.png": picture(1, mode="L"),
        "Images/b.tif": picture(2, "TIFF", "I;16"),
    }
    if unpacked:
        for name, data in files.items():
            (folder / "OmniMedVQA" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "OmniMedVQA" / name).write_bytes(data)
    else:
        write_zip(folder / "OmniMedVQA.zip", {f"OmniMedVQA/{name}": data for name, data in files.items()})
    return Expected(
        [
            ("<image>What is it?\nA. CT\nB. MR\nC. PET\nD. X-ray", "D", "letter", 1),
            ("<image>Normal?\nA. No, it's ill\nB. Yes", "B", "letter", 1),
            ("<image>Gap?\nA. one\nB. three", "B", "letter", 1),
            ("<image>Which?\nA. CT\nB. MR", "A", "letter", 1),
        ],
        ["'three' is not among", "text of 2 options"],
    )


def mmmu_row(identity: str, question: str, options: str, answer: str, kind: str = "multiple-choice", **images) -> dict:
    empty = {f"image_{number}": None for number in range(1, 8)}
    rest = {"img_type": "['CT scans', \"MRI\"]", "topic_difficulty": "Hard", "subfield": "Surgery", "explanation": ""}
    row = {"id": identity, "question": question, "options": options, "answer": answer, "question_type": kind}
    return row | empty | images | rest


def write_mmmu_medical(folder: Path) -> Expected:
    from vitos.eval.datasets.mmmu_medical import SUBJECTS

    clinical = [
        mmmu_row(
            "validation_Clinical_Medicine_1", "Seen in <image 1>?", "['it\\'s A', \"B, or C\"]", "B", image_1=image(1)
        ),
        mmmu_row(
            "validation_Clinical_Medicine_2",
            "<image 2> and <image 1>: is <image 2> later?",
            "['<image 3>', 'neither']",
            "A",
            image_1=image(1),
            image_2=image(2, mode="L", size=(30, 16)),
            image_3=image(3, size=(40, 16)),
        ),
        mmmu_row("validation_Clinical_Medicine_3", "How many?", "[]", "12", "open", image_1=image(1)),
        mmmu_row(
            "validation_Clinical_Medicine_4", "How many <image 1>?", "[]", "['1', 'one']", "open", image_1=image(1)
        ),
        mmmu_row("validation_Clinical_Medicine_5", "Seen in <image 2>?", "['a', 'b']", "A", image_1=image(1)),
        mmmu_row("validation_Clinical_Medicine_6", "<image 1>?", "__import__('os')", "A", image_1=image(1)),
        mmmu_row("validation_Clinical_Medicine_7", "<image 1>?", "['a', 'b']", "?", image_1=image(1)),
        mmmu_row("validation_Clinical_Medicine_8", "Nothing?", "['a', 'b']", "A"),
    ]
    for subject in SUBJECTS:
        other = [mmmu_row(f"validation_{subject}_1", "<image 1> Which?", "['x', 'y']", "A", image_1=image(9))]
        rows = clinical if subject == "Clinical_Medicine" else other
        write_parquet(folder / subject / "validation-00000-of-00001.parquet", rows)
    other = ("<image> Which?\nA. x\nB. y", "A", "letter", 1)
    mine = [
        ("Seen in <image>?\nA. it's A\nB. B, or C", "B", "letter", 1),
        ("<image> and <image>: is image 2 later?\nA. <image>\nB. neither", "A", "letter", 3),
        ("<image>How many?", "12", "text", 1),
    ]
    reasons = [
        "several right answers",
        "image_2 holds no image",
        "not a printed list",
        "no public answer",
        "has no image",
    ]
    return Expected([other, *mine, other, other, other], reasons)


def medx_row(number: int, question: str, options: dict, label: str, images: list[str], **more) -> dict:
    listed = " ".join(f"({letter}) {text}" for letter, text in options.items())
    row = {
        "id": f"MM-{number}",
        "question": f"{question}\nAnswer Choices: {listed}",
        "options": options,
        "label": label,
    }
    kinds = {"medical_task": "Diagnosis", "body_system": "Nervous", "question_type": "Reasoning"}
    return row | {"images": images} | kinds | more


def write_medxpertqa(folder: Path) -> Expected:
    options = dict(zip("ABCDE", ("one", "two (B) or so", "three", "four", "five"), strict=True))
    rows = [
        medx_row(0, "Which (A) is it?", options, "E", ["MM-0-a.jpeg"]),
        medx_row(1, "Compare.", options, "A", ["MM-1-a.jpeg", "MM-0-a.jpeg"]),
        medx_row(2, "Compare.", options, "A", ["MM-1-a.jpeg", "MM-9-a.jpeg"]),
        medx_row(3, "Text only.", options, "A", []),
        medx_row(4, "Odd.", {"1": "a", "2": "b"}, "1", ["MM-0-a.jpeg"]),
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "MM").mkdir()
    (folder / "MM" / "test.jsonl").write_text("\n".join([*lines, '{"id": "MM-5", "quest', ""]), encoding="utf-8")
    images = {"images/MM-0-a.jpeg": picture(1, "JPEG"), "images/MM-1-a.jpeg": picture(2, "JPEG", "L")}
    write_zip(folder / "images.zip", images)
    listed = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    return Expected(
        [
            (f"<image>Which (A) is it?{listed}", "E", "letter", 1),
            (f"<image><image>Compare.{listed}", "A", "letter", 2),
        ],
        ["no image 'MM-9-a.jpeg'", "has no image", "letter '1'", "is not JSON"],
    )


def write_medical_bundle(folder: Path) -> Expected:
    def row(question: str, names: list[str], options: list[str], answer: str, dataset: str, subset: str) -> dict:
        texts = {"question": question, "options": options, "answer": answer}
        return {"image": names, **texts, "dataset": dataset, "subset": subset}

    one = ["images/a.png"]
    rows = [
        row("Which?", one, ["CT", "MR"], "MR", "OmniMedVQA", "X-Ray"),
        row("Is it?", one, ["yes", "no"], "no", "VQA-RAD", "closed"),
        row("Both?", ["images/a.png", "images/b.png"], ["x", "y", "z"], "z", "MMMU", "Pharmacy"),
        row("Open?", one, [], "left", "VQA-RAD", "open"),
        row("None?", one, ["x", "y"], "w", "SLAKE", ""),
        row("No image?", [], ["x", "y"], "x", "SLAKE", ""),
    ]
    (folder / "medical_multimodel_evaluation_data.json").write_text(json.dumps(rows), encoding="utf-8")
    write_zip(folder / "images.zip", {"images/a.png": picture(1), "images/b.png": picture(2)})
    return Expected(
        [
            ("<image>Which?\nA. CT\nB. MR", "B", "letter", 1),
            ("<image>Is it?\nA. yes\nB. no", "B", "letter", 1),
            ("<image><image>Both?\nA. x\nB. y\nC. z", "C", "letter", 2),
            ("<image>Open?", "left", "text", 1),
        ],
        ["not among the options", "has no image"],
    )


WRITERS = {
    "vqa_rad": write_vqa_rad,
    "slake": write_slake,
    "path_vqa": write_path_vqa,
    "pmc_vqa": write_pmc_vqa,
    "omnimedvqa": write_omnimedvqa,
    "mmmu_medical": write_mmmu_medical,
    "medxpertqa": write_medxpertqa,
    "medical_bundle": write_medical_bundle,
}
