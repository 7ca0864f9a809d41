"""The adapters of the readings' tests, here beside PEFT's own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "readings"))
