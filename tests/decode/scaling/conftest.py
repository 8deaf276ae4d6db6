"""Tests are collected without a package: the toys lie beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
