"""Pictures of rollouts: the image with the kept tokens and the boxes of a question's first localization."""

from __future__ import annotations

from PIL import Image

from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports.overlay import draw_overlay
from vitos.rl.rollout import QuestionGroup


def draw_sample(group: QuestionGroup) -> Image.Image:
    """The whole image of a question, RGB, tokens that were dropped dimmed, written and gold boxes on top."""
    kept, boxes = group.kept[0], group.localizations[0].response.boxes
    whole = load_image(without_crop(group.record.image_paths[0]))
    return draw_overlay(whole, kept.grid, kept.mask, boxes, group.record.boxes or ())
