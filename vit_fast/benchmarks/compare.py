"""Two records of one machine against each other: what got faster or slower beyond the noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from vit_fast.benchmarks.record import key_of
from vit_fast.benchmarks.tables import milliseconds
from vit_fast.terminal import styled, table

LEAST = 0.03  # what is smaller than this is no difference, however steady the times
_SAME = ("device", "threads", "torch", "triton", "vit_fast", "commit")


@dataclass(frozen=True)
class Change:
    before: dict
    after: dict

    @property
    def times(self) -> float:
        """How many times as fast it is now."""
        return self.before["ms"] / self.after["ms"]

    @property
    def beyond_noise(self) -> bool:
        """The middle three fifths of the samples don't overlap, and the medians are further apart than `LEAST`."""
        a, b = self.before, self.after
        apart = b["p20"] > a["p80"] or b["p80"] < a["p20"]
        return apart and abs(self.times - 1) > LEAST


def changes(before: dict, after: dict) -> list[Change]:
    """A change for each row that both records have, the largest first."""
    rows = {key_of(row): row for row in before["rows"]}
    found = [Change(rows[key_of(row)], row) for row in after["rows"] if key_of(row) in rows]
    return sorted(found, key=lambda change: -abs(change.times - 1))


def drift(found: list[Change]) -> float | None:
    """How many times as fast the machine itself was: the median over what no code of ours computes."""
    ours = ("plain", "freeze", "triton", "cpp", "auto")
    stock = [change.times for change in found if not change.after["contender"].startswith(ours)]
    return statistics.median(stock) if stock else None


def told(before: dict, after: dict) -> str:
    """The comparison as text."""
    found = changes(before, after)
    lines = []
    for name in _SAME:
        a, b = before["environment"].get(name), after["environment"].get(name)
        if a != b:
            lines.append(f"{name}: {a} before, {b} now")
    for headline, those in (
        ("faster", [c for c in found if c.beyond_noise and c.times > 1]),
        ("slower", [c for c in found if c.beyond_noise and c.times < 1]),
    ):
        cells = [
            (
                " ".join(filter(None, key_of(change.after)[1:])),
                milliseconds(change.before["ms"]),
                milliseconds(change.after["ms"]),
                f"{change.times:.2f}x",
            )
            for change in those
        ]
        lines.append(styled(f"{len(those)} {headline} beyond the noise", "bold"))
        if cells:
            lines.append(table(("", "before", "now", "as fast"), cells))
    machine = drift(found)
    if machine is not None:
        lines.append(
            f"What no code of ours computes runs {machine:.2f}x as fast as before: that much is the machine's, or torch's."
        )
    only = [len(r["rows"]) - len(found) for r in (before, after)]
    lines.append(f"{len(found)} rows in both files, {only[0]} only in the first, {only[1]} only in the second")
    return "\n".join(lines)
