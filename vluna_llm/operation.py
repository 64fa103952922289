"""The three machines of one operation: admission, work and settlement. Pure: no clock, no I/O, no locks.

An operation is one logical model call. Its state is a frozen value; every event is a method that returns the next
state. Events may come in any order and more than once (a stream is closed by its consumer, by an error and by the
garbage collector at about the same time): an event that no longer means anything returns the state unchanged.

========== ============================================================================================
admission  ``pending`` -> ``leased`` | ``ungated`` | ``denied``; ``unknown`` while an authorize timed out
work       ``not_started`` -> ``running`` -> ``completed`` | ``failed`` | ``aborted`` | ``parked``
settlement ``none`` -> ``pending`` -> ``sent`` -> ``booked`` | ``quarantined`` (-> ``rebooked``) |
           ``refused`` | ``lapsed``; ``lost`` for work whose owner died
operator   ``refused`` -> ``pending`` (retry); ``refused``, ``quarantined`` -> ``pending`` (repair);
           everything that waits -> ``lapsed`` (drop)
prices     an ingest of which lines were booked as 0: ``sent`` -> ``pending`` with the ``rest`` alone
========== ============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .types import Dialect, UsageSource
from .usage.meters import MeterLine
from .usage.types import TokenUsage

Admission = Literal["pending", "leased", "ungated", "denied", "unknown"]
Work = Literal["not_started", "running", "completed", "failed", "aborted", "parked"]
Settlement = Literal["none", "pending", "sent", "booked", "quarantined", "rebooked", "refused", "lapsed", "lost"]
Route = Literal["commit", "cancel", "ingest"]

TERMINAL: frozenset[Settlement] = frozenset({"booked", "rebooked", "refused", "lapsed"})


class Part(NamedTuple):
    """One ingest that charged a part of an operation, in XUSD."""

    commit_id: str
    charged_xusd: int


@dataclass(frozen=True, slots=True)
class OperationState:
    """Where one operation stands.

    ``route`` is how it is being settled. ``cancel_sent`` is remembered for ever: once the gate may have ended the
    lease, usage that turns up can only be booked by ingest. ``look_first``: a commit of this usage may have been
    charged, so the gate's own books are looked at before anything is sent. ``used_up`` counts the ingests that the
    gate took and booked as 0, wholly or in part, for want of a price; each has used up its key for ever. ``rest`` is
    what of the usage is still to be charged after such an ingest, None where there was none: it alone is sent under the
    next key. ``parts`` is what was charged before. ``meters`` is the usage on meters that the caller named, in the
    order of their codes: it is charged by these lines, and the total of ``usage`` only counts against quotas. Handed to
    other hosts, such a row has them as its ``rest`` from the start (`vluna_llm.sharing.handing`).
    """

    admission: Admission = "pending"
    work: Work = "not_started"
    settlement: Settlement = "none"
    route: Route | None = None
    dialect: Dialect = "lease_token"
    usage: TokenUsage | None = None
    usage_source: UsageSource | None = None
    cancel_sent: bool = False
    look_first: bool = False
    used_up: int = 0
    rest: tuple[MeterLine, ...] | None = None
    parts: tuple[Part, ...] = ()
    meters: tuple[MeterLine, ...] = ()

    # -- admission -------------------------------------------------------------------------------------------------

    def leased(self, dialect: Dialect) -> OperationState:
        """Authorize returned a lease. A lease that turns up after the call went ungated changes nothing (rule 7)."""
        if self.admission not in ("pending", "unknown") or self.work != "not_started":
            return self
        return replace(self, admission="leased", dialect=dialect)

    def late_lease(self, dialect: Dialect) -> OperationState:
        """The lease of a job, asked for when its usage is known already, so that all its runs share one (rule 17)."""
        if self.admission != "ungated" or self.settlement != "pending" or self.route != "ingest":
            return self
        if self.rest is not None:
            return self  # a part is charged already, and a commit would charge the whole
        return replace(self, admission="leased", dialect=dialect, route="commit")

    def outcome_unknown(self) -> OperationState:
        """Authorize was sent and no answer came."""
        return replace(self, admission="unknown") if self.admission == "pending" else self

    def ungated(self) -> OperationState:
        """The call goes on without a lease; its usage is booked by ingest."""
        if self.admission not in ("pending", "unknown") or self.work != "not_started":
            return self
        return replace(self, admission="ungated")

    def denied(self) -> OperationState:
        """The call is refused and nothing was spent."""
        if self.admission not in ("pending", "unknown") or self.work != "not_started":
            return self
        return replace(self, admission="denied")

    # -- work ------------------------------------------------------------------------------------------------------

    @property
    def may_run(self) -> bool:
        """Whether the provider may be called."""
        return self.admission in ("leased", "ungated")

    def started(self) -> OperationState:
        """The provider is being called."""
        if not self.may_run or self.work != "not_started":
            return self
        return replace(self, work="running")

    def completed(
        self,
        usage: TokenUsage,
        source: UsageSource,
        *,
        shared_lease: bool = False,
        meters: tuple[MeterLine, ...] = (),
    ) -> OperationState:
        """The usage of the work is known. It outranks failure and abort until a settlement is on its way.

        A cancel that was composed and not sent is withdrawn; one that was sent is followed by an ingest, since the
        lease may be gone (rule 6). A usage of zero tokens charges nothing: the lease is cancelled (rule 5).

        ``shared_lease``: all runs of a job have the same lease (rule 17), and another one may have been charged for it,
        of which an ingest knows nothing. So even after a cancel a commit asks first, and is repaired where it finds the
        lease cancelled.
        """
        if self.work == "completed" or not self.may_run or self.work == "not_started":
            return self
        if source == "estimated" and self.work != "running":
            return self  # a guess never outranks how the work was seen to end
        if self.settlement not in ("none", "pending", "sent", "lapsed", "lost") or (
            self.settlement in ("pending", "sent", "lapsed") and self.route not in ("cancel", None)
        ):
            return self
        if usage.total_tokens == 0:
            done = replace(self, work="completed", usage=usage, usage_source=source)
            return done if self.settlement in ("pending", "sent", "lapsed") else done._without_usage()
        # Lost: the owner was only asleep, nobody cancelled, and the lease is as good as before.
        usable = self.settlement == "lost" or not self.cancel_sent or shared_lease
        return replace(
            self,
            work="completed",
            usage=usage,
            usage_source=source,
            settlement="pending",
            route="commit" if self.admission == "leased" and usable else "ingest",
            meters=meters,
        )

    def failed(self) -> OperationState:
        """The provider refused or broke and no usage can follow."""
        return self._ended("failed")

    def aborted(self) -> OperationState:
        """The consumer left before the answer was finished and no usage can follow."""
        return self._ended("aborted")

    def parked(self) -> OperationState:
        """The provider works on in the background; a later retrieve brings the usage and books it by ingest.

        The lease is left to lapse: cancelling gives nothing back (gate contract 7.6).
        """
        if self.work != "running" or self.settlement != "none":
            return self
        return replace(self, work="parked", settlement="lapsed")

    def _ended(self, work: Literal["failed", "aborted"]) -> OperationState:
        if self.work != "running" or self.settlement != "none":
            return self
        return replace(self, work=work)._without_usage()

    def _without_usage(self) -> OperationState:
        if self.admission == "leased" and self.dialect == "lease_token" and not self.cancel_sent:
            return replace(self, settlement="pending", route="cancel")
        return replace(self, settlement="lapsed", route=None)

    # -- settlement ------------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will be sent for this operation."""
        return self.settlement in TERMINAL or self.admission == "denied"

    def sent(self) -> OperationState:
        """The settlement's bytes are about to leave; from here on they never change."""
        if self.settlement not in ("pending", "sent") or self.look_first:
            return self
        return replace(self, settlement="sent", cancel_sent=self.cancel_sent or self.route == "cancel")

    def booked(self) -> OperationState:
        """The gate took the settlement: charged, or cancelled where that was asked."""
        if self.settlement != "sent":
            return self
        return replace(self._without_rest(), settlement="lapsed" if self.route == "cancel" else "booked")

    def partly_booked(
        self,
        rest: tuple[MeterLine, ...] | None,
        parts: tuple[Part, ...] = (),
        *,
        round_: int | None = None,
        wait: bool = False,
    ) -> OperationState:
        """The gate took an ingest and booked these lines as 0, for want of a price: they go out under the next key.

        Args:
            rest: the lines that were not charged; nothing else of the usage is open. None where that is all of it:
                it goes out as the prices are then.
            parts: what was charged of this operation beside them.
            round_: the number of the key under which they were booked as 0; this operation's own where not given.
            wait: nothing goes out before an operator's repair.
        """
        if self.settlement != "sent" or self.route != "ingest":
            return self
        used_up = self.used_up if round_ is None else round_
        return replace(
            self,
            settlement="quarantined" if wait else "pending",
            rest=rest,
            parts=self.parts + parts,
            used_up=used_up if wait else used_up + 1,
        )

    def by_lines(self, lines: tuple[MeterLine, ...]) -> OperationState:
        """All that is to be charged is known line by line: whatever repairs it sends these, never the total."""
        return replace(self, rest=lines) if self.rest is None and self.meters else self

    def _without_rest(self) -> OperationState:
        return self if self.rest is None else replace(self, rest=())

    def quarantined(self) -> OperationState:
        """The gate answered 200 and charged nothing (gate contract 9.2)."""
        return replace(self, settlement="quarantined") if self.settlement == "sent" else self

    def repair(self, *, look_first: bool = False) -> OperationState:
        """Usage that was not charged goes out as an ingest under a key derived from the commit's (rule 6).

        A commit that was *refused* may have been charged all the same: an earlier answer may have been lost, and a gate
        looks at feature and entitlement before it remembers what it booked (gate contract 7.5). So the gate's books are
        looked at first, always; until they were, the operation stays a commit. Of one that was *quarantined* the caller
        says whether they have to be: the answer itself tells that nothing was charged, except for a lease found closed.
        An ingest is repaired by an ingest: under the same key where it was refused (the gate remembers what it booked,
        so that nothing is charged twice), under the next one where it was booked as 0.
        """
        if self.settlement not in ("quarantined", "refused") or self.usage is None or self.route == "cancel":
            return self
        if self.route == "commit" and (look_first or self.settlement == "refused"):
            return replace(self, settlement="pending", look_first=True)
        used_up = self.used_up + (self.settlement == "quarantined" and self.route == "ingest")
        return replace(self, settlement="pending", route="ingest", used_up=used_up)

    def found_booked(self) -> OperationState:
        """The gate's books show that a commit of this usage was charged: nothing more is sent."""
        if self.settlement != "pending" or not self.look_first:
            return self
        return replace(self, settlement="booked", look_first=False)

    def found_unbooked(self) -> OperationState:
        """The gate's books show that no commit of this usage was charged: an ingest goes out."""
        if self.settlement != "pending" or not self.look_first:
            return self
        return replace(self, route="ingest", look_first=False)

    def rebooked(self) -> OperationState:
        """The repair was charged."""
        if self.settlement != "sent" or self.route != "ingest":
            return self
        return replace(self._without_rest(), settlement="rebooked")

    @property
    def is_repair(self) -> bool:
        """Whether the ingest on its way books what a commit did not charge.

        A leased operation is booked by ingest for two reasons only, and the other one is a cancel that was sent.
        """
        return self.route == "ingest" and self.admission == "leased" and not self.cancel_sent

    def refused(self) -> OperationState:
        """The gate will never take these bytes; an operator has to look."""
        return replace(self, settlement="refused") if self.settlement in ("pending", "sent") else self

    def retry(self) -> OperationState:
        """The operator mended what the gate refused: the same bytes go out again under the same key.

        Nothing is charged twice: a gate remembers the commits and ingests that it booked by their keys, for ever.
        """
        return replace(self, settlement="pending", look_first=False) if self.settlement == "refused" else self

    def dropped(self) -> OperationState:
        """The operator settled it by hand: nothing more is sent, whatever usage turns up later.

        What was given up with ``commit`` or ``ingest`` as its route is final (`completed`).
        """
        if self.settlement not in ("pending", "sent", "quarantined", "refused", "lost"):
            return self
        route: Route = "ingest" if self.route == "ingest" else "commit"
        return replace(self, settlement="lapsed", route=route, look_first=False)

    def charged_all_the_same(self) -> OperationState:
        """The gate charged what an operator dropped while it was on its way."""
        if self.settlement != "lapsed" or self.route not in ("commit", "ingest"):
            return self
        return replace(self, settlement="rebooked" if self.is_repair else "booked")

    def lapsed(self) -> OperationState:
        """Nothing is owed and nothing is sent; the lease runs out by itself."""
        return replace(self, settlement="lapsed") if self.settlement in ("none", "pending", "sent") else self

    def owner_died(self) -> OperationState:
        """Found unfinished in the journal of a dead process: charged nothing, never cancelled, listed."""
        return replace(self, settlement="lost") if self.settlement == "none" and self.admission != "denied" else self
