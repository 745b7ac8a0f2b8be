"""Measures of answer texts against reference texts: a name is a file here, or an entry point of `vitos.metrics`.

A measure is a module with one function:

    def measure(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]

`references[i]` are the accepted texts of answer i, one or more; a missing answer is "". It returns figures by name,
in the unit that the field uses. `bleu` and `rouge` need the extra `report`. Clinical measures, which bring models of
their own, are plug-ins: docs/metrics.md has one from start to end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitos.core.registry import Registry

METRICS = Registry("vitos.eval.metrics", "vitos.metrics")
"""Files with a measure, by name."""


class MetricError(RuntimeError):
    """A measure cannot be used, or gave something that is not a finite number."""


def measure(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The figures of one measure, by name.

    Raises:
        MetricError: if the measure's packages are not installed, or it gives no finite numbers.
        ValueError: if there is no such measure; the message lists those that there are.
    """
    try:
        module = METRICS.module(name)
        figures: Mapping[str, float] = module.measure(answers, references)
    except ImportError as error:
        raise MetricError(
            f"the measure {name} needs {error.name}; for bleu and rouge, pip install 'vitos[report]'"
        ) from error
    except AttributeError as error:
        raise MetricError(f"the measure {name}: {error}; a measure has a function `measure`") from error
    if not isinstance(figures, Mapping) or not all(_is_number(value) for value in figures.values()):
        raise MetricError(f"the measure {name} gave {figures!r}, not finite numbers by name")
    return {str(key): float(value) for key, value in figures.items()}


def check_metrics(names: Sequence[str]) -> None:
    """Try each measure on one text before hours are spent on the answers.

    Raises:
        MetricError, ValueError: as `measure`.
    """
    for name in names:
        measure(name, ["No acute finding."], [["No acute finding."]])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
