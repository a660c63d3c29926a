"""Our methods beside other people's code for the same: the table of the newest session on each device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.efficiency.peers.record import PeerRow, PeersRecord
from harness.records.reading import read
from harness.records.units import MIB
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, table_of_rows

CAPTION = (
    "Our methods beside other people's code for the same, one step each by turns in one process: ours to the peer's. "
    "Tokens/s: larger is better; everything else: smaller."
)


def write_peers(folder: Path) -> None:
    """Write the tables of the records in `folder` beside them."""
    for table in peers_tables(folder):
        table.write(folder)


def peers_tables(folder: Path) -> Iterator[Table]:
    """A table for each device that has a record in `folder`; none where there is no such folder."""
    newest: dict[str, PeersRecord] = {}
    for path in sorted(folder.glob("*.json")):
        record = read(path, PeersRecord)
        before = newest.get(record.device.name)
        if before is None or before.provenance.started_utc < record.provenance.started_utc:
            newest[record.device.name] = record
    for place, record in enumerate(newest.values()):
        yield _table(record, "peers" if not place else f"peers-{place + 1}")


def _table(record: PeersRecord, name: str) -> Table:
    notes = Footnotes()
    raw, display = [], []
    for row in record.rows:
        raw.append(_raw(row))
        display.append(_shown(row, record, notes))
    shape, device = record.shape, record.device
    threads = f", {device.threads} thread{'s' * (device.threads != 1)}" if device.kind == "cpu" else ""
    notes.add(
        f"{device.name}{threads}; {record.geometry.architecture} of {record.geometry.parameters / 1e6:.1f} M "
        f"parameters, fp32, {shape.batch} × {shape.length} tokens a step; layers are drawn every "
        f"{record.period_steps} steps, the same ones for all. Ratios are medians of rounds in which each takes one "
        f"step, of {'processor time' if device.kind == 'cpu' else 'CUDA events'}; ± is half of the 95 % interval."
    )
    notes.add(
        "Update: clipping, the optimizer's step and dropping gradients. Peak: of a process of its own, weights and "
        "all, from before the model is built. State: alive between two steps, without weights. Loss: of one more batch "
        f"after {record.steps_before_loss} steps, nats per token, of random tokens: it says whether both do the same."
    )
    return table_of_rows(name, CAPTION, raw, display, notes)


def _raw(row: PeerRow) -> dict[str, object]:
    ours, peer = row.our_side, row.peer_side
    return {
        "ours": row.ours,
        "peer": row.peer,
        "package": row.package,
        "tokens_per_s_ratio": row.speed_ratio and row.speed_ratio.median,
        "half_width": row.speed_half_width,
        "steady": row.steady,
        "rounds": row.rounds,
        "disturbed_rounds": row.disturbed_rounds,
        "update_ratio": row.update_ratio,
        "peak_ratio": row.peak_ratio,
        "state_ratio": row.state_ratio,
        "our_tokens_per_s": ours and ours.tokens_per_s,
        "peer_tokens_per_s": peer and peer.tokens_per_s,
        "our_peak_bytes": ours and ours.peak_bytes,
        "peer_peak_bytes": peer and peer.peak_bytes,
        "our_state_bytes": ours and ours.state_bytes,
        "peer_state_bytes": peer and peer.state_bytes,
        "our_loss": ours and ours.loss,
        "peer_loss": peer and peer.loss,
        "note": row.note,
        "missing_why": row.missing_why,
    }


def _shown(row: PeerRow, record: PeersRecord, notes: Footnotes) -> dict[str, str]:
    mark = notes.mark(row.note) if row.note else ""
    shown = {"ours": row.ours, "peer": row.peer + (f" ({row.package})" if row.package else "") + mark}
    ours, peer = row.our_side, row.peer_side
    if ours is None or peer is None:
        unknown = dict.fromkeys(("tokens/s", "update", "peak", "state", "loss"), UNKNOWN)
        return {**shown, **unknown, "tokens/s": UNKNOWN + notes.mark(f"{row.peer}: {row.missing_why}.")}
    same = ours.loss is not None and ours.loss == peer.loss
    return {
        **shown,
        "tokens/s": _speed(row, record, notes),
        "update": number(row.update_ratio, 2),
        "peak": f"{number(row.peak_ratio, 2)} of {_mib(peer.peak_bytes)}",
        "state": f"{number(row.state_ratio, 2)} of {_mib(peer.state_bytes)}",
        "loss": "equal to the bit" if same else f"{number(ours.loss, 4)}; {number(peer.loss, 4)}",
    }


def _speed(row: PeerRow, record: PeersRecord, notes: Footnotes) -> str:
    if row.speed_ratio is None:
        return UNKNOWN + notes.mark(f"every round was disturbed: {row.disturbed_why}.")
    wide = "" if row.speed_half_width is None else f" ± {100 * row.speed_half_width:.1f} %"
    missed = (
        ""
        if row.steady
        else notes.mark(
            f"not known to ± {100 * record.bound:.0f} % after {row.rounds} rounds ({row.disturbed_rounds} disturbed)."
        )
    )
    return f"{number(row.speed_ratio.median, 3)}{wide}{missed}"


def _mib(count: int | None) -> str:
    return UNKNOWN if count is None else f"{number(count / MIB, 0)} MiB"
