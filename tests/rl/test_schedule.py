"""Which branch is trained at which update, against hand-written timetables."""

from types import SimpleNamespace

import pytest

from vitos.config.options import DualStreamOptions
from vitos.rl.schedule import Stage, make_stages, stage_at

# L and R: weight 1 on one branch; B: weight 1 on both; one letter an update, "|" where a stage begins.
TIMETABLES = {
    "staged": "LLL|RR",
    "reversed": "RR|LLL",
    "localization-only": "LLL",
    "reasoning-only": "RR",
    "alternating": "LRLRL",
    "joint": "BBBBB",
    "dense": "RRRRR",
}
LETTERS = {
    "L": {"localization": 1.0},
    "R": {"reasoning": 1.0},
    "B": {"localization": 1.0, "reasoning": 1.0},
}


def options(schedule, **more):
    return DualStreamOptions(schedule=schedule, localization_steps=3, reasoning_steps=2, **more)


@pytest.mark.parametrize(("schedule", "table"), TIMETABLES.items())
def test_timetable(schedule, table):
    stages = make_stages(options(schedule))
    step = 0
    for number, letters in enumerate(table.split("|")):
        for letter in letters:
            found, stage = stage_at(stages, step)
            assert (found, dict(stage.branches(step))) == (number, LETTERS[letter]), step
            assert stage.dense == (schedule == "dense")
            step += 1
    assert step == options(schedule).total_steps
    for outside in (-1, step):
        with pytest.raises(ValueError, match=f"update {outside} lies outside the run of {step}"):
            stage_at(stages, outside)


def test_alternating_begins_with_localization_wherever_its_stage_starts():
    stage = Stage(name="alternating", start=3, steps=4)
    assert [list(stage.branches(step)) for step in (3, 4, 5)] == [["localization"], ["reasoning"], ["localization"]]


def test_share_mixes_the_localization_loss_into_stage_two_only():
    first, second = make_stages(options("staged", localization_share=0.25))
    assert dict(first.branches(0)) == {"localization": 1.0}
    assert dict(second.branches(3)) == {"localization": 0.25, "reasoning": 0.75}


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'both'"):
        make_stages(SimpleNamespace(schedule="both", localization_steps=1, reasoning_steps=1))
