"""Plan one_pass in the demo, with a head of `vitos distill`: against `ask`, and what is drawn of its scores."""

import numpy as np
import pytest

from vitos.core.geometry import Box, TokenGrid
from vitos.core.sparsify import best_cells, rectangles
from vitos.policy.vlm import SparseVLM
from vitos.reports.overlay import PREDICTED_COLOUR, SCORE_COLOUR, draw_overlay
from vitos.serve.demo import figures
from vitos.serve.demo.compare import RECTANGLES, SCORES, compare, compare_plans, plans_of
from vitos.serve.demo.session import Session

gr = pytest.importorskip("gradio", reason="the demo extra is not installed")

from vitos.serve.demo.handlers import Handlers  # noqa: E402


@pytest.fixture(scope="module")
def vlm(headed):
    return SparseVLM.from_pretrained(headed, device="cpu")


@pytest.fixture(scope="module")
def compared(vlm, examples):
    return compare(vlm, examples[4].images, examples[4].question, "one_pass")


def colours(picture, colour):
    return (np.asarray(picture) == colour).all(axis=2)


def test_it_is_offered_and_answers_as_ask(vlm, examples, compared):
    assert "one_pass" in plans_of(vlm)[0]
    assert [text.split(":")[0] for text in plans_of(vlm)[1]] == ["glance"]  # its head was trained for one_pass
    dense, sparse, random = compared
    alone = vlm.ask(vlm.encode(examples[4].image, plan="one_pass"), examples[4].question, plan="one_pass")
    np.testing.assert_array_equal(sparse.finding.kept.mask, alone.kept.mask)
    assert sparse.finding.reasoning.response.text == alone.reasoning.response.text
    assert sparse.finding.kept.count == random.finding.kept.count == 16 < dense.finding.kept.count
    encode, localize, _, reason = sparse.seconds
    assert min(encode, localize, reason) > 0
    assert sum(sparse.seconds) == pytest.approx(sum(sparse.finding.seconds.values()))
    assert "one_pass" in [answer.finding.plan for answer in compare_plans(vlm, examples[4].images, "What is it?")]


def test_a_budget_takes_the_best_cells_and_boxes_replace_the_scores(vlm, examples, compared):
    _, sparse, _ = compare(vlm, examples[4].images, examples[4].question, "one_pass", budget=0.1)
    scores = compared.answers[1].finding.kept.scores
    np.testing.assert_array_equal(sparse.finding.kept.mask, best_cells(sparse.finding.grid, scores, 6).mask)
    box = Box(0, 0, 0.5, 0.25)
    _, boxed, _ = compare(vlm, examples[4].images, examples[4].question, "one_pass", boxes=[box])
    assert (boxed.finding.kept.count, boxed.boxes) == (8, (box,))
    assert "your boxes" in figures.steps(boxed, examples[4].question, 1)


def test_scores_are_an_overlay_and_boxes_come_on_request(compared):
    sparse = compared.answers[1]
    assert sparse.boxes == ()
    assert not colours(sparse.picture(1, ()), PREDICTED_COLOUR).any()
    assert colours(sparse.picture(1, [RECTANGLES]), PREDICTED_COLOUR).any()
    kept = sparse.finding.kept
    assert sparse.finding.boxes == rectangles(kept)
    # Without cells, the picture with scores differs from the image by the score's colour alone, most at the best cell.
    plain, tinted = (np.asarray(sparse.picture(1, draw, cells=False), dtype=float) for draw in ((), [SCORES]))
    change = np.abs(tinted - plain).sum(axis=2).reshape(8, 48, 8, 48).mean(axis=(1, 3)).ravel()
    likely = 1 / (1 + np.exp(-kept.scores.astype(float)))
    share = 0.65 * likely / likely.max()
    expected = np.abs(
        share[:, None] * (np.array(SCORE_COLOUR) - plain.reshape(8, 48, 8, 48, 3).mean((1, 3)).reshape(64, 3))
    )
    assert np.corrcoef(change, expected.sum(1))[0, 1] > 0.95
    assert np.argmax(share) in np.argsort(-share)[:3]
    assert "scores of the evidence head" in figures.steps(sparse, "What?", 1)


def test_the_overlay_mixes_the_colour_by_the_score():
    from PIL import Image

    image = Image.new("RGB", (40, 20), (10, 20, 30))
    drawn = np.asarray(draw_overlay(image, TokenGrid.single(1, 2), None, (), scores=[0.5, 0], min_side=1))
    mixed = [round(v + 0.5 * 0.65 * (c - v)) for v, c in zip((10, 20, 30), SCORE_COLOUR, strict=True)]
    assert (drawn[:, :20] == mixed).all()
    assert (drawn[:, 20:] == (10, 20, 30)).all()
    for scores, grid in (([0.5], TokenGrid.single(1, 2)), ([0.5], None)):
        with pytest.raises(ValueError, match="scores need the grid"):
            draw_overlay(image, grid, None, (), scores=scores)


def test_the_budget_moves_the_scores_not_the_rectangles(vlm, examples, tmp_path, compared):
    handlers, session = Handlers(vlm, tmp_path, examples=examples), Session()
    list(handlers.open_example(session, examples[4]))
    handlers.begin(session, 0, 1, examples[4].question)
    handlers.ask(session, 0, 1, examples[4].question, "one_pass", 0.0, "", 0)
    for budget, count in ((0.0, 16), (0.05, 3), (0.5, 32)):
        heading, _ = handlers.slide(session, 0, 1, "", budget)
        assert f"{count} of 64" in heading
    assert handlers.take(session).count("\n") + 1 == len(compared.answers[1].finding.boxes)
