"""What one call costs on the caller's thread besides the gate's round trip: estimate, machine, journal, telemetry."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from typing import Any

from vluna_llm import Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.gate.client import GateClient
from vluna_llm.gate.requests import GateRequest
from vluna_llm.gate.wire import Answer
from vluna_llm.lifecycle import ModelCall
from vluna_llm.types import Lease
from vluna_llm.usage.types import TokenUsage

from .figures import Figure, Profile, mean_of
from .servers import MODEL, OUTPUT_TOKENS, PROMPT_TOKENS, world

SENTENCE = "The customer wrote that the parcel arrived late and asked for a refund of the fee. "
CUSTOMERS = 10
BODY = {
    "model": MODEL,
    "messages": [{"role": "system", "content": SENTENCE * 12}, {"role": "user", "content": SENTENCE * 37}],
    "stream": True,
}


class AtHand:
    """Makes a gate client answer at once: with the real gate's lease for each customer, and its first commit."""

    def __init__(self, gate: GateClient) -> None:
        self._authorize, self._send = gate.authorize, gate.send
        self._leases: dict[str, Lease] = {}
        self._booked: Answer | None = None
        self.given = 0
        gate.authorize = self.authorize  # type: ignore[method-assign]
        gate.send = self.send  # type: ignore[method-assign]

    async def aauthorize(self, **asked: Any) -> Lease:
        """In the place of an asynchronous client's ``authorize``."""
        return self.authorize(**asked)

    def authorize(self, **asked: Any) -> Lease:
        lease = self._leases.get(asked["principal_id"])
        if lease is None:
            lease = self._leases[asked["principal_id"]] = self._authorize(**asked)
        else:
            self.given += 1
        return lease

    def send(self, request: GateRequest, **how: Any) -> Answer:
        if request.kind != "commit":
            return self._send(request, **how)
        if self._booked is None:
            self._booked = self._send(request, **how)
        else:
            self.given += 1
        return self._booked


def local_work(profile: Profile) -> list[Figure]:
    """CPU of the caller's thread from the beginning of a call to its durable end, with the journal on disk."""
    many = profile.some(100)
    call = ModelCall("chat.completions", "openai", MODEL, BODY, True)
    ending = Ending("complete", TokenUsage(input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS), finished=True)
    spent: dict[str, list[float]] = defaultdict(list)
    with world() as around, Vluna(**around.settings()) as vluna:
        at_hand = AtHand(vluna.gate)
        for block in range(profile.blocks + 2):
            caller = wall = 0.0
            process = 0.0
            for number in range(many):
                ended = dataclasses.replace(ending, response_id=f"chatcmpl-{block}-{number}")
                now, thread, cpu = time.perf_counter(), time.thread_time(), time.process_time()
                with call_context(principal_id=f"customer_{number % CUSTOMERS}"):
                    operation = vluna.begin(call)
                    assert operation is not None
                    operation.finish(ended)
                caller += time.thread_time() - thread
                wall += time.perf_counter() - now
                # Delivered between two calls: what is measured is a call, not a fight of two threads for one lock.
                assert vluna.flush(30)
                process += time.process_time() - cpu
            if block >= 2:
                spent["caller"].append(1e6 * caller / many)
                spent["wall"].append(1e6 * wall / many)
                spent["process"].append(1e6 * process / many)
    calls = (profile.blocks + 2) * many
    assert at_hand.given >= 2 * calls - CUSTOMERS - 1, "the gate was asked after all"
    group = "local work"
    return [
        mean_of(
            group,
            "caller's CPU per call",
            "µs",
            spent["caller"],
            budget=100.0,
            note="4 KB of prompt, journal on disk, no round trip",
        ),
        mean_of(group, "caller's time per call", "µs", spent["wall"], note="until the operation is durably ended"),
        mean_of(
            group,
            "whole process's CPU per call",
            "µs",
            spent["process"],
            note="with the settler and flush, no round trips",
        ),
    ]
