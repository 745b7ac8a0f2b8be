"""The probe: its figures are those of the rollouts, and its advice names what is missing."""

import copy
from dataclasses import replace

import pytest
from scripts.nano_model import NANO_SPEC, build_nano
from typer.testing import CliRunner

from vitos.cli.main import app
from vitos.config.options import DualStreamOptions
from vitos.data.phantom import write_phantoms
from vitos.doctor.probe import Probe, probe, render_probe
from vitos.engines.base import Sampling
from vitos.policy.vlm import SparseVLM
from vitos.rl.rewards import RewardWeights
from vitos.rl.rollout import RolloutOptions, roll_out
from vitos.scans.store import ScanStore

OPTIONS = DualStreamOptions(
    num_localizations=2,
    num_reasonings=3,
    stage1_num_localizations=3,
    stage1_num_reasonings=2,
    questions_per_step=2,
    max_localization_tokens=24,
    max_reasoning_tokens=14,
    localization_steps=10,
    reasoning_steps=30,
    temperature=1.4,
)


def test_figures_are_those_of_the_rollouts(warm_policy, phantom_records):
    found = probe(warm_policy, phantom_records, OPTIONS, RewardWeights(), questions=4)
    assert (found.questions, found.boxed) == (4, 1.0)
    # The same questions by hand: shares of texts, and of questions whose answers differ.
    import numpy as np

    chosen = [phantom_records[i] for i in np.random.default_rng(0).permutation(len(phantom_records))[:4].tolist()]

    def by_hand(size):
        options = RolloutOptions(
            num_localizations=size[0],
            num_reasonings=size[1],
            localize=Sampling(24, 1.4),
            reason=Sampling(14, 1.4),
            seed=0,
        )
        scans = ScanStore(warm_policy).get(chosen)
        return roll_out(warm_policy, chosen, scans, 0, options, RewardWeights()).groups

    first, second = by_hand((3, 2)), by_hand((2, 3))
    read = [r.response.evidence_parsed for g in first for r in g.localizations]
    right = [g.rewards.terms["sparse_accuracy"] for g in second]
    assert found.figures["parse_rate"] == pytest.approx(sum(read) / len(read))
    assert found.figures["accuracy/sparse"] == pytest.approx(float(np.mean(right)))
    assert found.informative["reasoning"] == sum(np.ptp(r) > 0 for r in right) / 4
    assert found.update_seconds == pytest.approx(2 * found.seconds)
    assert found.hours > 0


READY = Probe(
    questions=8,
    figures={
        "parse_rate": 0.9,
        "no_answer_rate": 0.1,
        "truncated_rate": 0.05,
        "accuracy/localization": 0.5,
        "accuracy/sparse": 0.5,
        "iou": 0.4,
        "kept_ratio": 0.3,
        "zero_std_rate": 0.2,
        "group_std/localization": 0.2,
        "group_std/reasoning": 0.3,
    },
    informative={"localization": 0.8, "reasoning": 0.6},
    seconds=1.0,
    update_seconds=16.0,
    hours=1.0,
    boxed=1.0,
)


def warned(found):
    return {check.name: check.remedy for check in found.checks if check.status != "ok"}


@pytest.mark.parametrize(
    ("figure", "value", "name", "advice"),
    [
        ("parse_rate", 0.4, "boxes", "vitos sft"),
        ("no_answer_rate", 0.6, "answers", "max_reasoning_tokens"),
        ("iou", 0.01, "places", "model.coordinates"),
        ("truncated_rate", 0.3, "lengths", "mask_truncated"),
        ("accuracy/sparse", 0.99, "difficulty", "harder"),
        ("accuracy/sparse", 0.01, "difficulty", "easier"),
    ],
)
def test_advice_names_what_is_missing(figure, value, name, advice):
    assert warned(READY) == {}
    told = warned(replace(READY, figures=READY.figures | {figure: value}))
    assert list(told) == [name]
    assert advice in told[name]


def test_advice_on_signal_and_missing_boxes():
    told = warned(replace(READY, informative={"localization": 0.8, "reasoning": 0.1}))
    assert list(told) == ["signal of reasoning"]
    assert "oversampling_rounds" in told["signal of reasoning"]
    unboxed = replace(READY, boxed=0.0, figures=READY.figures | {"iou": float("nan")})
    assert "places" not in {check.name for check in unboxed.checks}
    assert render_probe(unboxed)


def test_a_model_that_was_never_trained_is_sent_to_the_warm_start(phantom_records):
    policy = SparseVLM(copy.copy(build_nano()), NANO_SPEC)
    options = replace(OPTIONS, stage1_num_localizations=None, stage1_num_reasonings=None)
    told = warned(probe(policy, phantom_records, options, RewardWeights(), questions=2))
    assert "vitos sft" in told["boxes"]
    assert "lengths" in told
    with pytest.raises(ValueError, match="no training questions"):
        probe(policy, [], options, RewardWeights(), questions=2)


def test_one_command_estimates_and_probes(tmp_path):
    train = write_phantoms(tmp_path / "data", "train", 6)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\noutput_dir: {tmp_path / 'run'}\ndata: {{train: {train}}}\n"
        "train: {questions_per_step: 2, num_localizations: 2, num_reasonings: 2, max_localization_tokens: 80}\n"
    )
    device = "80GB 989TFLOPS 3.35TB/s"
    done = CliRunner().invoke(app, ["doctor", "--recipe", str(recipe), "--device", device, "--probe", "2"])
    assert done.exit_code == 0, done.output
    assert "Probe: 2 training questions" in done.output
    assert "signal of reasoning" in done.output
    assert not (tmp_path / "run").exists()
    alone = CliRunner().invoke(app, ["doctor", "--probe", "2"])
    assert alone.exit_code == 2
