"""Whether an answer is the captured one: every member, every value, but for what differs from run to run.

Ids are translated (a captured id always stands for the same one of ours), moments and fingerprints only have to be
of the right form, save those that tell a window or a date of the request.
"""

from __future__ import annotations

import re
from typing import Any

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TOKEN = re.compile(r"lease\.([0-9a-f-]{36})\.([0-9a-f]{16})")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?(Z|\+00:00)\Z")
FINGERPRINT = re.compile(r"[0-9a-f]{64}\Z")
EXACT_MOMENTS = {"window_start", "window_end", "until", "period_start", "period_end", "occurred_at"}


class Ids:
    """Captured id to ours."""

    def __init__(self) -> None:
        self.ours: dict[str, str] = {}

    def learn(self, captured: str, ours: str) -> None:
        self.ours[captured] = ours

    def translate(self, text: str) -> str:
        """Captured text with our ids in it; a whole lease token goes before the id inside it."""
        text = TOKEN.sub(lambda match: self.ours.get(match[0], match[0]), text)
        return UUID.sub(lambda match: self.ours.get(match[0], match[0]), text)

    def same(self, captured: str, ours: str) -> bool:
        """Whether ours may stand for the captured one; remembers it when it was not known."""
        if captured in self.ours:
            return self.ours[captured] == ours
        if UUID.fullmatch(captured) and captured.startswith("00000000-"):
            return captured == ours
        if ours in self.ours.values():
            return False
        self.ours[captured] = ours
        return True


def differences(captured: Any, ours: Any, ids: Ids, path: str = "", key: str = "") -> list[str]:
    """Where the two differ, as sentences; empty where they agree."""
    if isinstance(captured, dict) and isinstance(ours, dict):
        out = [f"{path}.{name} is missing" for name in captured if name not in ours]
        out += [f"{path}.{name} should not be there: {ours[name]!r}" for name in ours if name not in captured]
        for name, value in captured.items():
            if name in ours:
                out += differences(value, ours[name], ids, f"{path}.{name}", name)
        return out
    if isinstance(captured, list) and isinstance(ours, list):
        if len(captured) != len(ours):
            return [f"{path} has {len(ours)} items, captured {len(captured)}"]
        if key in ("rated_records", "records"):
            captured, ours = sorted(captured, key=_meter), sorted(ours, key=_meter)
        return [
            text
            for index, (left, right) in enumerate(zip(captured, ours, strict=True))
            for text in differences(left, right, ids, f"{path}[{index}]", key)
        ]
    if type(captured) is not type(ours):
        return [f"{path} is {ours!r}, captured {captured!r}"]
    if isinstance(captured, str):
        return _text(captured, ours, ids, path, key)
    if key == "delta_ms" and abs(captured - ours) <= 250:
        return []
    return [] if captured == ours else [f"{path} is {ours!r}, captured {captured!r}"]


def _text(captured: str, ours: str, ids: Ids, path: str, key: str) -> list[str]:
    wrong = [f"{path} is {ours!r}, captured {captured!r}"]
    if captured == "<jwt>":
        return [] if ours.count(".") == 2 else wrong
    if captured.startswith("cancel_") and key == "trace_id":
        return [] if ours.startswith("cancel_") else wrong
    if key == "next_cursor":
        return [] if ours else wrong
    if FINGERPRINT.match(captured):
        return [] if FINGERPRINT.match(ours) else wrong
    if TOKEN.fullmatch(captured):
        return [] if TOKEN.fullmatch(ours) and ids.same(captured, ours) else wrong
    if UUID.fullmatch(captured):
        return [] if UUID.fullmatch(ours) and ids.same(captured, ours) else wrong
    if MOMENT.match(captured):
        exact = key in EXACT_MOMENTS or captured.startswith(("1970", "2030", "2026-09", "2026-11-20"))
        if exact:
            return [] if _plain(captured) == _plain(ours) else wrong
        return [] if MOMENT.match(ours) else wrong
    return [] if ids.translate(captured) == ours else wrong


def _plain(moment: str) -> str:
    return moment.replace("+00:00", "Z").replace(".000Z", "Z")


def _meter(row: Any) -> tuple[str, int]:
    return (row.get("meter") or row.get("meter_code") or "", int(row.get("q") or row.get("quantity_minor") or 0))
