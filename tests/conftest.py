"""Where several workers run (pytest -n), each keeps to one thread, and so do its children."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
