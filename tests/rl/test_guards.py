"""Guards on figures made up here."""

from types import SimpleNamespace

import pytest

from vitos.rl.guards import WINDOW, CollapseWarning, UpdateGuard

FINE = {"fallback_rate": 0.1, "parse_rate": 0.9, "whole_image_rate": 0.0, "no_answer_rate": 0.1}


def warnings_of(rows, caplog, first=True):
    callback = CollapseWarning()
    caplog.clear()
    for step, row in enumerate(rows, start=1):
        state = SimpleNamespace(global_step=step, is_world_process_zero=first)
        callback.on_log(None, state, None, logs=row)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fallback_rate", 0.8, "80 % of the localizations have no box that could be used"),
        ("parse_rate", 0.2, "only 20 % of the localizations have an <evidence> list that can be read"),
        ("whole_image_rate", 0.9, r"90 % of the localizations have a box around (nearly) the whole image"),
        ("no_answer_rate", 0.7, "70 % of the reasonings end without an answer"),
    ],
)
def test_a_rate_that_stays_bad_is_said_once(name, value, words, caplog):
    rows = [FINE] * 30 + [FINE | {name: value}] * 60
    (message,) = warnings_of(rows, caplog)
    assert words.split(" % ")[1] in message
    step = int(message.split()[1].rstrip(":"))
    assert 30 < step <= 30 + WINDOW
    assert [words] == [w for w in [words] if w in warnings_of([FINE | {name: value}] * WINDOW, caplog)[0]]
    assert warnings_of(rows, caplog, first=False) == []


def test_good_rates_and_short_dips_are_not_said(caplog):
    assert warnings_of([FINE] * 50, caplog) == []
    assert warnings_of(([FINE] * WINDOW + [FINE | {"fallback_rate": 1.0}] * 3) * 5, caplog) == []
    assert warnings_of([{"learning_rate": 1.0}] * 50, caplog) == []


def test_the_count_starts_again_after_a_good_update():
    guard = UpdateGuard(2)
    bad = [(float("nan"), 1.0), (1.0, float("inf"))]
    assert [guard.admits(1, *x, ["a"]) for x in (*bad, (1.0, 1.0), *bad)] == [False, False, True, False, False]
    with pytest.raises(FloatingPointError, match=r"update 9 is nan .*questions \['a'\]\): 3 such updates in a row"):
        guard.admits(9, float("nan"), 0.0, ["a"])
