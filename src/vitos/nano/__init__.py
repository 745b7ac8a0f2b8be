"""The embedded small models: `nano` and `nano-volumes` for phantoms, complete; `nano-real` and `small` for real
images, without the parts that others have made.

- `weights/`: the checkpoint of `nano`. `scripts/make_nano.py` in the repository trains it (docs/nano.md).
- `volumes/`: that of `nano-volumes`, which `scripts/make_nano_volumes.py` trains further for several images.
- `real/`: the decoder of `nano-real`. `real.py` combines it with a DINOv2-S that the user has or downloads
  (docs/nano-real.md).
- `small/`: the adapters of `small`. `small.py` combines them with the same encoder and a SmolLM2-135M-Instruct
  (docs/small.md).

`vitos.policy.locate` turns the names into folders.
"""

from pathlib import Path

NANO = "nano"
NANO_VOLUMES = "nano-volumes"
NANO_REAL = "nano-real"
SMALL = "small"
NANO_PATH = Path(__file__).parent / "weights"
VOLUMES_PATH = Path(__file__).parent / "volumes"
DECODER_PATH = Path(__file__).parent / "real"  # nano-real without the weights of its vision encoder
SMALL_PATH = Path(__file__).parent / "small"  # small without the weights of SmolLM2 and DINOv2
COMPLETE = {NANO: NANO_PATH, NANO_VOLUMES: VOLUMES_PATH}
EMBEDDED = (*COMPLETE, NANO_REAL, SMALL)
