"""The embedded small models: `nano`, whole, for phantoms, and `nano-real` for real images, without its encoder."""

from pathlib import Path

NANO = "nano"
NANO_REAL = "nano-real"
NANO_PATH = Path(__file__).parent / "weights"
DECODER_PATH = Path(__file__).parent / "real"  # of nano-real: all but the vision encoder's weights
