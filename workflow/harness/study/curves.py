"""Whether live curves of runs are asked for (`harness.training.curves`).

By an environment variable and no key of a study: a run is named by what determines it, and who watches it does not.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from harness.errors import UserError

FOLDER = "GRASS_TENSORBOARD"
"""Environment variable: the folder that gets one folder of events a run."""


def wanted() -> Path | None:
    """The folder for curves; None where none are asked for.

    Raises:
        UserError: they are asked for, and TensorBoard is not installed.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"{FOLDER}={folder}: the package tensorboard is not installed: pip install tensorboard")
    return Path(folder)
