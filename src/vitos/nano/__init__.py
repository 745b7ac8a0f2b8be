"""The embedded small models: `nano` for phantoms, complete, and `nano-real` for real images, without its encoder.

- `weights/`: the checkpoint of `nano`. `scripts/make_nano.py` in the repository trains it (docs/nano.md).
- `real/`: the decoder of `nano-real`. `real.py` combines it with a DINOv2-S that the user has or downloads
  (docs/nano-real.md).

`vitos.policy.locate` turns the two names into folders.
"""

from pathlib import Path

NANO = "nano"
NANO_REAL = "nano-real"
NANO_PATH = Path(__file__).parent / "weights"
DECODER_PATH = Path(__file__).parent / "real"  # nano-real without the weights of its vision encoder
