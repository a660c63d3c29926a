"""Whether a record was made by today's code, and which files differ where it was not."""

from __future__ import annotations

from harness.records.code import Code, code_of
from harness.records.reading import Origin
from harness.study.plan import Output

UNSAID = "files that the record does not name"
"""Of a record that is older than the hashes of single files."""


def current(output: Output) -> Code:
    """Today's code for making this record."""
    return code_of(output.kind.roots(output.job))


def is_stale(provenance: Origin, output: Output) -> bool:
    """Whether the record with this provenance is stale: made by other code than today's."""
    return provenance.source_sha256 != current(output).sha256


def changed_files(provenance: Origin, output: Output) -> list[str]:
    """The code files changed, added or removed since a record was made: by module, as in `harness.records.code`."""
    then, now = provenance.sources, current(output).sources
    if not then:
        return [UNSAID]
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
