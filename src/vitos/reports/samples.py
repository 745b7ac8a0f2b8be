"""Pictures of rollouts: the image with the kept tokens and the boxes of a question's first localization."""

from __future__ import annotations

from PIL import Image

from vitos.core.numbering import image_numbers
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports.sheet import draw_sheet
from vitos.rl.rollout import QuestionGroup


def draw_sample(group: QuestionGroup) -> Image.Image:
    """The whole images of a question, RGB, tokens that were dropped dimmed, written and gold boxes on top."""
    kept, boxes, record = group.kept[0], group.localizations[0].response.boxes, group.record
    whole = [load_image(without_crop(path)) for path in record.image_paths]
    return draw_sheet(whole, kept.grid, kept.mask, boxes, record.boxes or (), image_numbers(record.question))
