"""What models, tasks, suites, methods and tables of a study may be called."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

LONGEST_LABEL = 40
"""Letters: several labels make up the name of a file, which may have 255."""
Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=LONGEST_LABEL)]
