"""Every selector against what published code chose on fixed inputs, as `studies/bench/agreement.py` compares them."""

import pytest
import torch
from studies.bench.agreement import HERE, REFERENCE, Found, Row, compare, rows, table

# Ports whose rule is not that of the authors, with the robust runs in which they keep other tokens (docs/bench.md).
OTHER_RULES = {
    ("visionzip", "angelslim"): 2,
    ("tome", "pact, own limit"): 15,
    ("fastv", "angelslim"): 5,
    ("vispruner", "lightcompress-qwen2.5-vl"): 3,
    ("vispruner", "angelslim"): 15,
    ("dart", "lightcompress"): 20,
}


@pytest.fixture(scope="module")
def found():
    if not REFERENCE.is_dir():
        pytest.skip("../shared/data/selector_reference is not there: the agreement was not recomputed")
    return list(rows())


def test_the_same_tokens_as_the_authors(found):
    assert len(found) == 34
    for row in found:
        expected = row.robust - OTHER_RULES.get((row.selector, row.implementation), 0)
        assert (row.robust > 0, row.equal) == (True, expected), (row.selector, row.implementation, row.differing)
        assert row.in_order == row.ordered, (row.selector, row.implementation)
    authors = {row.selector for row in found if row.implementation.startswith("official") and row.equal == row.robust}
    assert authors >= {
        "cdpruner",
        "visionzip",
        "prumerge",
        "sparsevlm",
        "pyramiddrop",
        "holov",
        "vispruner",
        "hiprune",
    }


def test_the_same_embeddings_as_the_authors(found):
    merging = {row.selector: row.difference for row in found if row.difference is not None}
    assert merging.keys() == {"visionzip", "tome", "sparsevlm", "prumerge"}
    assert all(row.difference <= 1e-5 for row in found if row.difference is not None)


def test_the_table_in_the_repository_is_this_one(found):
    assert table(found).strip() == (HERE / "agreement.md").read_text(encoding="utf-8").strip()


def test_a_wrong_token_is_seen():
    """The comparison itself: one exchanged token, and one changed embedding, count as differences."""
    case = {"tokens": torch.zeros(4, 2)}
    run = {"case": "n36", "keep": 2, "robust": True, "kept": [1, 3], "order": [3, 1], "arrays": {"merged": "x"}}
    stored = {"x": torch.ones(2, 2).numpy()}

    def row(ours):
        made = Row("s", "i", "c")
        compare(made, lambda case, run: ours, dict(case), run, stored)
        return made

    right = row(Found([3, 1], True, merged={"merged": torch.ones(2, 2)}))
    assert (right.equal, right.in_order, right.difference) == (1, 1, 0.0)
    assert row(Found([1, 3], True)).in_order == 0
    assert row(Found([2, 1], True)).differing == ["n36/2"]
    assert row(Found([3, 1], True, merged={"merged": torch.ones(2, 2) + 0.5})).difference == 0.5
