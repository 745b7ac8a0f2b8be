"""(b) Updates of the dual stream at the shapes of published models, random weights: speed, and memory against plan.

Adapters on 3B and 7B, all weights on 3B. Both branches are trained in each update, after one that warms up. Random
weights write no box, so every reasoning prompt is dense: the most that an update can cost.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.inference_models import build_model
from benchmarks.peak import peak_memory
from benchmarks.train_shapes import question_text, random_image
from benchmarks.train_turns import noise
from scripts.gpu import Setting
from scripts.nano_model import NANO_SPEC

from vitos.core.record import Record
from vitos.doctor.devices import Device, detected_device
from vitos.doctor.estimate import Workload, batches, memory
from vitos.doctor.shapes import ModelShape, model_shape
from vitos.doctor.speed import forward_flops, seconds
from vitos.policy.types import Query
from vitos.policy.vlm import SparseVLM
from vitos.rl.config import DualStreamConfig
from vitos.rl.rewards import ExtraReward, RewardWeights
from vitos.rl.trainer import DualStreamTrainer

ROLLOUTS = ("localize_prefill", "localize_decode", "reason_prefill", "reason_decode")


@dataclass(frozen=True, slots=True)
class Case:
    """One model to train.

    Attributes:
        model: name, as `build_model` takes it.
        rank: rank of the adapters; None trains all weights of the language model.
        side: pixels per side of the square images.
        tokens: length of each completion.
        updates: number of measured updates.
    """

    model: str
    rank: int | None
    side: int = 448
    tokens: int = 64
    updates: int = 2
    questions: int = 2
    group: int = 4

    @property
    def text(self) -> str:
        return f"{self.model}, {'all weights' if self.rank is None else f'adapters of rank {self.rank}'}"


TRUE = (
    Case("Qwen2.5-VL-3B-Instruct", 64),
    Case("Qwen2.5-VL-7B-Instruct", 64),
    Case("Qwen2.5-VL-3B-Instruct", None),
)
TINY = (Case("nano", 4, 64, 4, 1, 1, 2), Case("nano", None, 64, 4, 1, 1, 2))


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row per model."""
    for number, case in enumerate(TINY if setting.tiny else TRUE):
        yield measure(case, setting, setting.folder / f"update-{number}")
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, setting: Setting, folder: Path) -> dict[str, Any]:
    """Train, and compare with the doctor's estimate."""
    folder.mkdir(parents=True)
    images = [random_image(folder, index, case.side) for index in range(case.questions)]
    device, cuda = setting.device, setting.device.type == "cuda"
    with peak_memory(device) as peak:
        dtype = torch.float32 if case.rank is None or not cuda else torch.bfloat16
        backbone, said = build_model(case.model, 1, dtype, device)
        policy = SparseVLM(backbone, NANO_SPEC)
        banned = backbone.banned_token_ids  # read before the stop tokens go, which it leaves out
        backbone.stop_token_ids, backbone.banned_token_ids = (), banned
        shape, work = estimate_of(case, policy, images[0], dtype, cuda)
        train(case, policy, images, folder / "run", cuda)
        del policy, backbone
    logs = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [log for log in logs if "seconds/update" in log][1:]  # the first one warms up
    times = {
        part: sum(log.get(f"seconds/{part}", 0.0) for log in steps) / len(steps) for part in (*ROLLOUTS, "update")
    }
    total, sampling = sum(times.values()), sum(times[part] for part in ROLLOUTS)
    written = case.questions * case.group * (1 + case.group) * case.tokens
    planned = memory(shape, work)
    known = detected_device() if cuda else None
    row = {
        "case": case.text,
        "said": said,
        "device": str(device),
        "ok": 0.5 < peak[0] / planned.peak < 1.5 if cuda else None,
        "peak_bytes": peak[0],
        "planned_peak_bytes": planned.peak,
        "planned": {name: dict(parts) for name, parts in planned.moments.items()},
        "seconds": times,
        "planned_seconds": seconds(shape, work, known, trained=("localization", "reasoning")) if known else None,
        "tokens_per_second": written / total,
        "share_sampling": sampling / total,
        "assumptions": assumptions(case, shape, work, times, known),
    }
    row["summary"] = (
        f"{row['tokens_per_second']:.0f} tokens/s, {row['share_sampling']:.0%} sampling, "
        f"peak {peak[0] / 2**30:.2f} GiB ({planned.peak / 2**30:.2f} planned)"
    )
    return row


def train(case: Case, policy: SparseVLM, images: Sequence[Path], folder: Path, cuda: bool) -> None:
    """One update to warm up, and the measured ones."""
    lora = None
    if case.rank is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear")
    config = DualStreamConfig(
        output_dir=str(folder),
        schedule="joint",
        localization_steps=1,
        reasoning_steps=case.updates,
        questions_per_step=case.questions,
        num_localizations=case.group,
        num_reasonings=case.group,
        max_localization_tokens=case.tokens,
        max_reasoning_tokens=case.tokens,
        skip_equal_outcomes=False,
        log_gradient_cosine_steps=10**6,  # at the warm-up only
        log_samples_steps=0,
        save_steps=10**6,
        disable_tqdm=True,
        bf16=cuda,
        use_cpu=not cuda,
    )
    records = [Record(f"{i}", (path,), question_text(i), "A") for i, path in enumerate(images)]
    extra = ExtraReward("noise", lambda response, record: noise(response.text), weight=1.0, branch="both")
    trainer = _Unwritten(policy, config, records, reward_weights=RewardWeights(), reward_funcs=[extra], lora=lora)
    trainer.train()


class _Unwritten(DualStreamTrainer):
    """Writes no model: gigabytes of random weights are of no use."""

    def _write_policy(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """No checkpoint either."""

    def _merge_in_place(self) -> None:
        """Adapters stay: the policy is thrown away."""


def estimate_of(
    case: Case, policy: SparseVLM, image: Path, dtype: torch.dtype, cuda: bool
) -> tuple[ModelShape, Workload]:
    """What the doctor is told about the case."""
    scan = policy.encode(image)
    query = Query(scan, question_text(0))
    size = torch.finfo(dtype).bits // 8
    defaults = DualStreamConfig(output_dir="unused", use_cpu=True)
    return model_shape(policy.backbone.model.config, max_pixels=case.side**2), Workload(
        localize_tokens=len(policy.branches.localize_prompt(query)),
        reason_tokens=len(policy.branches.reason_prompt(query)),
        visual_tokens=scan.visuals[0].grid.num_tokens,
        max_localization_tokens=case.tokens,
        max_reasoning_tokens=case.tokens,
        questions=case.questions,
        num_localizations=case.group,
        num_reasonings=case.group,
        micro_batch_tokens=defaults.micro_batch_tokens,
        weight_bytes=size,
        precision="autocast" if cuda else "float32",
        rank=case.rank,
        cosine=True,
        scans=case.questions,
        kept_share=1.0,
    )


def assumptions(
    case: Case, shape: ModelShape, work: Workload, times: dict[str, float], known: Device | None
) -> dict[str, Any] | None:
    """What `vitos doctor --measured` reads: the shares of the peaks that this device reached."""
    if known is None:
        return None
    passes = 3.0 if case.rank is None else 2.0
    operations = sum(
        count * forward_flops(shape, b.rows, b.row_tokens, b.rows * b.siblings * b.longest)
        for b, count in batches(work).values()
    )
    return {
        "device": known.name,
        "compute": passes * operations / times["update"] / known.flops,
        "launch": times["localize_decode"] / case.tokens / shape.layers,
    }
