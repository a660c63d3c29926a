"""Give the records of an efficiency study, kept one a cell until now, the names that never collide.

`python workflow/scripts/move_efficiency_records.py results/published/efficiency` moves `forecasts/<cell>.json` and
`records/<device>/<cell>.json` to `records/<cell>--<asked>--<card>--<code>.json` (see `harness.efficiency.store`); what
is in them stays as it is. Only a folder that was filled by an older version needs this, once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.efficiency.record import CellRecord, ForecastRecord
from harness.efficiency.store import file_name


def main(folder: Path) -> int:
    """Move every record of one folder; refuse to replace one."""
    found = [(path, ForecastRecord) for path in sorted((folder / "forecasts").glob("*.json"))]
    found += [(path, CellRecord) for path in sorted((folder / "records").glob("*/*.json"))]
    for path, kind in found:
        new = folder / "records" / file_name(kind.model_validate_json(path.read_bytes()))
        if new.exists():
            sys.exit(f"{path}: {new} is there already")
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    for emptied in {path.parent for path, _ in found}:
        emptied.rmdir()
    print(f"{len(found)} records moved to {folder / 'records'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
