"""A small synthetic result, with its cases and images, as an evaluation writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "name": "quickstart",
        "seed": 3,
        "dataset": "phantom/test",
        "num_questions": 600,
        "base_dense_accuracy": 0.612,
        "localization_accuracy": 0.671,
        "sparse_accuracy": 0.683,
        "relative_performance": 1.116,
        "relative_performance_ci": [1.05, 1.18],
        "kept_ratio": 0.241,
        "kept_ratio_p10": 0.09,
        "kept_ratio_p90": 0.44,
        "mean_iou": 0.55,
        "mean_iou_before": 0.31,
        "fallback_rate": 0.012,
        "parse_rate": 0.99,
        "control_untrained_sparse_accuracy": 0.58,
        "control_random_accuracy": 0.42,
        "control_centre_accuracy": 0.45,
        "control_inverted_accuracy": 0.31,
        "control_oracle_accuracy": 0.7,
        "control_rl_dense_accuracy": None,
        "seconds_by_stage": {
            "vision": 0.5,
            "localize_decode": 1.5,
            "sparsify": 0.01,
            "total": 2.01,
            "dense_total": 1.0,
        },
        "conditions": {
            "base_dense": {"num_questions": 600, "accuracy": 0.612, "ci": [0.57, 0.65], "kept_ratio": 1.0},
            "sparse": {"num_questions": 600, "accuracy": 0.683, "ci": [0.64, 0.72], "kept_ratio": 0.241},
            "random": {"num_questions": 600, "accuracy": 0.42, "ci": [0.38, 0.46], "kept_ratio": 0.241},
            "oracle": {"num_questions": 600, "accuracy": 0.7, "ci": None, "kept_ratio": 0.2},
        },
        "comparisons": [
            {"a": "sparse", "b": "random", "difference": 0.263, "ci": [0.22, 0.31], "p_value": 1e-9},
            {"a": "oracle", "b": "sparse", "difference": 0.017, "ci": [-0.01, 0.04], "p_value": 0.21},
        ],
        "by_template": {
            "how_many": {"num_questions": 120, "base_dense": 0.5, "sparse": 0.6, "random": None, "kept_ratio": 0.2}
        },
        "budgets": {
            "0.1": {"sparse": 0.5, "random": 0.3, "oracle": 0.6, "kept_ratio": 0.1},
            "0.5": {"sparse": 0.65, "random": 0.45, "oracle": 0.7, "kept_ratio": 0.5},
        },
        "checkpoint": "runs/quickstart/model",
        "vitos_version": "0.1.0",
        "command": "vitos eval recipes/quickstart.yaml",
    }


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    """A question that was answered rightly; its image of 64 x 64 pixels is in `tmp_path`."""
    Image.new("RGB", (64, 64), (200, 200, 200)).save(tmp_path / "image.png")
    return {
        "id": "test/0/0",
        "template": "how_many",
        "image": "image.png",
        "question": "<image>How many?\nA. 1\nB. 2",
        "gold": "B",
        "gold_boxes": [[0.0, 0.0, 0.5, 0.5]],
        "grid": [{"rect": [0, 0, 1, 1], "rows": 4, "cols": 4}],
        "conditions": {
            "localization": {
                "text": "two of them",
                "answer": "B",
                "correct": True,
                "boxes": [[0, 0, 0.5, 0.5]],
                "iou": 1.0,
                "parsed": True,
            },
            "sparse": {"text": "I see two", "answer": "B", "correct": True, "kept": [0, 1, 4, 5], "fallback": False},
            "random": {"text": "unclear", "answer": None, "correct": False},
        },
    }
