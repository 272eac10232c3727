"""What is counted while conversations are regenerated, and the page that shows it: answers before and after."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from draft_model.regenerate.conversation import Outcome

_REFUSAL = re.compile(
    r"(?:<think>.*?</think>)?\W*(?:(?:i'?m|i am) (?:really |very )?(?:sorry|unable|not able)|sorry\b|i apologi[sz]e|"
    r"i (?:can'?t|cannot|can not|won't|will not) (?:help|assist|provide|answer|fulfil|do|create|write|comply|discuss)|"
    r"as an ai\b|unfortunately, i\b)",
    re.IGNORECASE | re.DOTALL,
)
_SAMPLES = 5
_SHOWN = 3000  # characters


@dataclass
class Tally:
    """Counts of a shard, or of a split; JSON values."""

    lines: int = 0  # of the input, times the samples of each
    conversations: int = 0  # written
    faulty: int = 0  # lines that cannot be used, whatever the target says
    answers: int = 0
    kept: int = 0  # assistant turns that were left as they were, and are not learnt
    cut: int = 0  # answers that reached their longest length
    identical: int = 0  # answers that are what was there
    refusals: int = 0  # answers that begin like one, in English
    tokens_before: int = 0
    tokens: int = 0
    ended_early: Counter[str] = field(default_factory=Counter)  # conversations, by reason
    put_aside: Counter[str] = field(default_factory=Counter)  # lines, by reason
    lengths_before: Counter[str] = field(default_factory=Counter)  # answers by tokens, up to a power of two
    lengths: Counter[str] = field(default_factory=Counter)
    rejected: list[dict[str, Any]] = field(default_factory=list)  # lines put aside: file, line, reason, detail
    samples: list[list[dict[str, str]]] = field(default_factory=list)  # of the first conversations: before, after

    def add(self, outcome: Outcome, file: str, line: int) -> None:
        """Counts one conversation."""
        self.lines += 1
        if outcome.record is None:
            self.faulty += outcome.faulty
            self.put_aside[outcome.reason] += 1
            record = {"file": file, "line": line, "reason": outcome.reason, "detail": outcome.detail}
            if record not in self.rejected[-1:]:  # another sample of the same line
                self.rejected.append(record)
            return
        self.conversations += 1
        self.kept += outcome.kept
        if outcome.reason:
            self.ended_early[outcome.reason] += 1
        for turn in outcome.turns:
            self.answers += 1
            self.cut += turn.finish == "length"
            self.identical += turn.before.strip() == turn.after.strip()
            self.refusals += bool(_REFUSAL.match(turn.after))
            self.tokens_before += turn.tokens_before
            self.tokens += turn.tokens
            self.lengths_before[_bin(turn.tokens_before)] += 1
            self.lengths[_bin(turn.tokens)] += 1
        if len(self.samples) < _SAMPLES:
            turns, shown = {turn.message: turn for turn in outcome.turns}, []
            for index, message in enumerate(outcome.record["conversations"]):
                made = turns.get(index)
                before, after = (made.before, made.after) if made else ("", message["content"] or "")
                shown.append({"role": message["role"], "before": before[:_SHOWN], "after": after[:_SHOWN]})
            self.samples.append(shown)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds the counts of a shard."""
        for name, value in other.items():
            if isinstance(value, dict):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)
        del self.samples[_SAMPLES:]

    def first_rejected(self) -> str:
        """The first lines put aside, in words."""
        found = [f"{it['file']} line {it['line']}: {it['reason']} ({it['detail']})" for it in self.rejected[:10]]
        return "; ".join(found) or "none"

    def summary(self) -> dict[str, Any]:
        """The counts, with shares of the answers."""
        found = {n: value for n, value in vars(self).items() if not isinstance(value, list | dict)}
        shares = {f"{n}_share": found[n] / max(1, self.answers) for n in ("cut", "identical", "refusals")}
        return {**found, **shares, "ended_early": dict(self.ended_early), "put_aside": dict(self.put_aside)}


def _bin(tokens: int) -> str:
    return str(max(16, 1 << (tokens - 1).bit_length()))


def make_report(properties: Mapping[str, Any], tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """The manifest's properties and the counts of each split, for report.json and the page."""
    splits = {}
    for split, tally in tallies.items():
        bins = sorted({*tally.lengths, *tally.lengths_before}, key=int)
        lengths = [{"up_to": int(b), "before": tally.lengths_before[b], "after": tally.lengths[b]} for b in bins]
        splits[split] = {**tally.summary(), "lengths": lengths, "samples": tally.samples}
    return {**properties, "splits": splits}
