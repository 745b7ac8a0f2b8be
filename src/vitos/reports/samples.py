"""Questions of one update with all their texts, and the first localization of each drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitos.data.files import write_json_atomic
from vitos.data.images import load_image
from vitos.data.picture import without_crop
from vitos.reports.overlay import draw_overlay
from vitos.rl.rollout import QuestionGroup


def write_samples(run: Path, step: int, groups: Sequence[QuestionGroup]) -> None:
    """Questions of one update with all their texts (`samples/step-N.json`) and the first localization drawn."""
    folder = run / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, group in enumerate(groups):
        kept, localization = group.kept[0], group.localizations[0]
        picture = draw_overlay(
            load_image(without_crop(group.record.image_paths[0])),
            kept.grid,
            kept.mask,
            localization.response.boxes,
            group.record.boxes or (),
        )
        name = f"step-{step}-{index}.png"
        picture.save(folder / name)
        rows.append(
            {
                "id": group.record.id,
                "question": group.record.question,
                "gold": group.record.answer,
                "overlay": name,
                "localizations": [
                    {
                        "text": rollout.completion.text,
                        "kept_ratio": selected.ratio,
                        "fallback": selected.fallback,
                        "rewards": rewards.tolist(),
                        "reasonings": [r.completion.text for r in row],
                    }
                    for rollout, selected, rewards, row in zip(
                        group.localizations,
                        group.kept,
                        group.rewards.localization,
                        group.reasonings,
                        strict=True,
                    )
                ],
            }
        )
    write_json_atomic(folder / f"step-{step}.json", rows)
