"""The estimate and the reader, from their own scripts, for the same table."""

from __future__ import annotations

import functools
import statistics

from vluna_llm.usage import make_reader

from . import bench_estimate, bench_reader
from .figures import Figure, Profile


def estimate(profile: Profile) -> list[Figure]:
    """What an estimate costs, and how good it is where the recordings are at hand."""
    predict, update = bench_estimate.cost()
    group = "estimate"
    figures = [
        Figure(
            group,
            "CPU of one prediction, 4 KB of prompt",
            "µs",
            predict,
            budget=bench_estimate.TARGET_MICROSECONDS,
            note="best of 30",
        ),
        Figure(group, "CPU of one lesson", "µs", update, note="on the settler's thread"),
    ]
    if not bench_estimate.RECORDINGS.is_dir():
        return figures
    applications = bench_estimate.load()
    shown = (
        (bench_estimate.recurring(applications, by_model=False), bench_estimate.TARGET_PERCENT),
        (bench_estimate.first_guess(applications), None),
        (bench_estimate.unseen(applications), None),
    )
    for errors, budget in shown:
        median = statistics.median(errors.total)
        note = f"{len(errors.total):,} predictions"
        figures.append(Figure(group, f"median error, {errors.name}", "%", median, budget=budget, exact=True, note=note))
    return figures


def reader(profile: Profile) -> list[Figure]:
    """What reading usage costs per piece of a stream, besides the loop around it.

    As the tap does it: the usage chunk is hidden in Chat Completions, where it was asked for; other APIs need not ask.
    """
    rounds = 3 if profile.quick else 40
    url, kind = "https://api.openai.com/v1/chat/completions", "text/event-stream"
    streams = {
        "chat, usage:null": (bench_reader.chat(False), True),
        "chat, usage:null, obfuscation": (bench_reader.chat(True), True),
        "responses": (bench_reader.responses(), False),
        "anthropic": (bench_reader.anthropic(), False),
    }
    figures = []
    for name, (pieces, hide) in streams.items():
        nothing = bench_reader.nanoseconds(lambda: bench_reader.Nothing().feed, pieces, rounds)
        make = functools.partial(make_reader, url, kind, hide_usage_chunk=hide)
        read = bench_reader.nanoseconds(lambda make=make: make().pass_through, pieces, rounds)  # type: ignore[misc]
        figures.append(Figure("reader", name, "ns", read - nothing, budget=1_000.0, note="best of several streams"))
    return figures
