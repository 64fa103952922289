"""The facade: settings in, metered clients and operations out."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from .admission import Admissions, Prepared
from .context import CallContext, current_context, make_context
from .errors import ConfigurationError, GateError, MissingPrincipal, VlunaError
from .gate.client import GateClient
from .gate.client_async import AsyncGateClient
from .identity import plain_text
from .lifecycle import ModelCall, Operation
from .manual import OperationContext
from .operation import OperationState
from .preparation import MOST, context_of, fingerprint_of, prepare
from .process import EXIT_SECONDS, Process
from .runtime import Runtime
from .settings import Mode, Settings
from .settlement import authorize_arguments
from .sharing import check_shared
from .slot import open_slot
from .telemetry import Telemetry, log
from .types import Lease
from .usage.estimate import Estimate, Estimator
from .usage.features import FeatureMap
from .usage.types import TokenUsage

C = TypeVar("C")


class Vluna:
    """A billing gate around model calls. One instance serves any number of threads, event loops and clients.

    Args:
        settings: how it behaves; from the environment where not given.
        feature_map: how models become feature codes, in place of the file in ``features``.
        **overrides: single settings by name, e.g. ``base_url=...``; not together with ``settings``.

    Raises:
        ConfigurationError: a setting is missing or wrong. Nothing is asked of the gate here.
    """

    def __init__(
        self, settings: Settings | None = None, *, feature_map: FeatureMap | None = None, **overrides: Any
    ) -> None:
        if settings is not None and overrides:
            raise ConfigurationError("Pass either a Settings object or single settings to Vluna(), not both.")
        self.settings = settings if settings is not None else Settings(**overrides)
        self.telemetry = Telemetry()
        self._mode: Mode = self.settings.mode
        self._features = feature_map or FeatureMap.from_dict(self.settings.load_features())
        self._estimator = Estimator()
        self._admissions = Admissions(self.settings, self.telemetry)
        self._process = Process(self.settings, self.telemetry, self._estimator, self._features)
        self._process.tell_back = self._admissions.gate_is_back
        if self.settings.outbox_shared is not None:
            check_shared(self.settings.outbox_shared.get_secret_value())
        if self._mode != "off":
            self._process.credentials()

    def __repr__(self) -> str:
        return f"Vluna(base_url={self.settings.base_url!r}, realm_id={self.settings.realm_id!r}, mode={self._mode!r})"

    # -- what applications use -------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: object) -> Vluna:
        """The same one: its connections and its journal are nobody's to copy."""
        return self

    @property
    def mode(self) -> Mode:
        """``enforce``, ``observe`` (ask and book, never refuse) or ``off``. May be set at run time: a kill switch."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        if value not in ("enforce", "observe", "off"):
            raise ConfigurationError(f"mode must be 'enforce', 'observe' or 'off', not {value!r}.")
        if value != "off":
            self._process.credentials()
        self._mode = value

    def wrap(self, client: C) -> C:
        """The same client, metered: an instance of a subclass of its class. The original is left as it was.

        Takes ``openai.OpenAI``, ``AsyncOpenAI``, their Azure variants and subclasses, or the module ``openai`` itself;
        ``anthropic.Anthropic``, ``AsyncAnthropic`` and that SDK's clients for other clouds.
        Wrapping a wrapped client meters once.

        Raises:
            ConfigurationError: this kind of client is not known.
        """
        return self._wrap(client, None)

    def bind(
        self,
        client: C,
        *,
        principal_id: str | None = None,
        user_id: str | None = None,
        feature_code: str | None = None,
        feature_family_code: str | None = None,
        budget_id: str | None = None,
        labels: Mapping[str, object] | None = None,
        end_user: str | None = None,
        request_id: str | None = None,
    ) -> C:
        """A metered client that bills one customer wherever it is used: in threads, in streaming responses, for ever.

        What it is bound to wins over the surrounding context.

        Raises:
            ConfigurationError: an id could not be signed, or this kind of client is not known.
        """
        bound = make_context(
            principal_id=principal_id,
            user_id=user_id,
            feature_code=feature_code,
            feature_family_code=feature_family_code,
            budget_id=budget_id,
            labels=labels,
            end_user=end_user,
            request_id=request_id,
        )
        return self._wrap(client, bound)

    def operation(
        self, *, feature_code: str, estimate: int = 0, feature_family_code: str | None = None
    ) -> OperationContext:
        """Gate and bill work that is no model call: a context manager, an async one and a decorator.

        Args:
            feature_code: what is sold.
            estimate: about how much, in the feature's unit, >= 0.
            feature_family_code: its family.

        Raises:
            ConfigurationError: the estimate is negative or the code is empty.
        """
        if isinstance(estimate, bool) or not isinstance(estimate, int) or estimate < 0:
            raise ConfigurationError(f"estimate must be an integer of at least 0, not {estimate!r}.")
        if estimate > MOST:
            raise ConfigurationError(f"estimate is {estimate}; the gate counts up to {MOST}.")
        context = make_context(feature_code=feature_code, feature_family_code=feature_family_code)
        return OperationContext(self, context, estimate)

    @property
    def gate(self) -> GateClient:
        """The typed gate client, for threads."""
        return self._process.gate

    @property
    def async_gate(self) -> AsyncGateClient:
        """The typed gate client, for event loops."""
        return self._process.async_gate

    def flush(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds until every settlement is delivered; False where something is left.

        It does not wait for what is only tried again later than that (a price that is missing, a key that is refused).
        """
        return self._process.flush(timeout)

    async def aflush(self, timeout: float | None = None) -> bool:
        """`flush` for coroutines."""
        import asyncio

        return await asyncio.to_thread(self.flush, timeout)

    def close(self, timeout: float = EXIT_SECONDS) -> bool:
        """Deliver for at most ``timeout`` seconds and stop; what is left stays on disk for the next process.

        Runs by itself at interpreter exit, also where the instance is not held any more. Using it again afterwards
        starts it again.
        """
        return self._process.close(timeout)

    async def aclose(self, timeout: float = EXIT_SECONDS) -> bool:
        """`close` for coroutines; also closes the connections of the running loop."""
        import asyncio

        done = await asyncio.to_thread(self.close, timeout)
        await self._process.aclose_gate()
        return done

    def __enter__(self) -> Vluna:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Vluna:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @classmethod
    def default(cls) -> Vluna:
        """The process's own instance, made from the environment on first use; the drop-in clients share it.

        Raises:
            ConfigurationError: the environment is incomplete or wrong.
        """
        global _default
        with _default_guard:
            if _default is None:
                _default = cls()
            return _default

    # -- what integrations use -------------------------------------------------------------------------------------

    def begin(self, call: ModelCall, bound: CallContext | None = None) -> Operation | None:
        """Admit a model call: capture who pays, ask the gate, keep a row. None where the call is not metered.

        Inside a slot (`vluna_llm.slot`) the operation that an outer layer has admitted is taken over.

        Raises:
            MissingPrincipal, ConfigurationError: nobody to bill, or something that can never be booked.
            GateDenied, GateRateLimited, InvalidGateRequest: the gate refused; the provider must not be called.
            GateUnavailable: no gate, and ``on_gate_unavailable="deny"``.
        """
        if (claimed := self._claimed(call.kind, bound)) is not None:
            return claimed
        prepared = self._unless_observed(lambda: self._prepare(call, bound))
        return None if prepared is None else self._admit(prepared)

    async def abegin(self, call: ModelCall, bound: CallContext | None = None) -> Operation | None:
        """`begin` for coroutines."""
        if (claimed := self._claimed(call.kind, bound)) is not None:
            return claimed
        prepared = self._unless_observed(lambda: self._prepare(call, bound))
        return None if prepared is None else await self._aadmit(prepared)

    def feature_of(self, call: ModelCall, bound: CallContext | None = None) -> str:
        """The feature code under which this call would be admitted.

        Raises:
            ConfigurationError: no code can be made of the model's name.
        """
        context = current_context() if bound is None else current_context().override(bound)
        return context.feature_code or self._features.resolve(call.model, call.provider).feature_code

    def begin_work(self, context: CallContext, estimate: int) -> Operation | None:
        """Admit work that is no model call."""
        prepared = self._unless_observed(lambda: self._prepare_work(context, estimate))
        return None if prepared is None else self._admit(prepared)

    async def abegin_work(self, context: CallContext, estimate: int) -> Operation | None:
        """`begin_work` for coroutines."""
        prepared = self._unless_observed(lambda: self._prepare_work(context, estimate))
        return None if prepared is None else await self._aadmit(prepared)

    def unmetered(self, what: str, bound: CallContext | None = None) -> None:
        """A call that costs money and that we do not meter (design rule 18): warn, refuse or ignore.

        Raises:
            ConfigurationError: ``on_unmetered="deny"``.
        """
        if self._mode == "off" or self.settings.on_unmetered == "ignore":
            return
        if self.settings.on_unmetered == "deny" and self._mode == "enforce":
            raise ConfigurationError(
                f"{what} costs money and is not metered, and VLUNA_LLM_ON_UNMETERED is 'deny'; "
                "set it to 'warn' to let such calls through unbilled."
            )
        context = current_context() if bound is None else current_context().override(bound)
        self.telemetry.emit(
            "vluna.endpoint.unmetered",
            "warn",
            {"vluna.endpoint": what, "vluna.principal.id": context.principal_id},
            message=f"{what} costs money and is not metered: nobody is billed for this call",
        )

    def book_background(
        self, response_id: str, usage: TokenUsage, call: ModelCall, bound: CallContext | None = None
    ) -> None:
        """A retrieve brought the usage of a background response: book it by ingest, once, on whatever host (rule 4).

        Its key is made of the realm and the response id, so that repeated retrieves book nothing more. Where this
        process created the response, who pays and the feature are those of that call: the retrieve may name nobody, and
        its answer carries the dated model name (rule 12).
        """
        try:
            if self._mode == "off":
                return
            parked = self._process.write(lambda runtime: runtime.ledger.journal.parked(response_id))
            if parked is not None:
                bound = context_of(parked).override(current_context()).override(bound or CallContext())
            prepared = self._prepare(call, bound, background=response_id)
            if prepared is None or usage.total_tokens == 0:
                return
            state = OperationState().ungated().started().completed(usage, "provider")
            done = prepared.with_state(state, plain_text(response_id))
            self._process.write(lambda runtime: self._book_once(runtime, done, usage))
        except VlunaError as error:
            self.telemetry.emit(
                "vluna.endpoint.unmetered",
                "error",
                {"error.type": type(error).__name__, "gen_ai.response.id": response_id},
                message=f"the usage of a background response is not booked: {error}",
            )
        except Exception:
            self.internal_error("vluna.book_background")

    def _book_once(self, runtime: Runtime, done: Prepared, usage: TokenUsage) -> None:
        guess = self._admissions.guess(runtime, done, self._features)
        if runtime.ledger.open_once(done.row, done.context.scopes, guess):
            for scope in done.context.scopes:
                scope.used(usage)
            runtime.settler.enqueue(done.row)

    def internal_error(self, where: str) -> None:
        """Called while an exception of ours is handled: log and count it; the product's call goes on."""
        self.telemetry.internal_error(where)

    def tell_nothing_recorded(self, operation_id: str) -> None:
        """A ``vluna.operation`` ended without ``record``: nothing is charged, and that is told."""
        log.warning("operation %s ended without op.record(...): nothing is charged", operation_id)

    # -- admission -------------------------------------------------------------------------------------------------

    def _claimed(self, kind: str, bound: CallContext | None) -> Operation | None:
        slot = open_slot()
        if slot is None or self._mode == "off":
            return None
        context = current_context() if bound is None else current_context().override(bound)
        return slot.claim(
            gate=(self.settings.base_url or "", self.settings.realm_id or ""),
            customer=(context.principal_id, context.user_id),
            kind=kind,
        )

    def _unless_observed(self, prepare: Callable[[], Prepared | None]) -> Prepared | None:
        """What ``prepare`` gives; in observe mode nothing is refused, and what cannot be billed is told."""
        try:
            return prepare()
        except VlunaError as error:
            if self._mode == "enforce":
                raise
            self._admissions.tell_unmetered(error)
            return None

    def _prepare(self, call: ModelCall, bound: CallContext | None, *, background: str | None = None) -> Prepared | None:
        if self._mode == "off":
            return None
        context = self._payer(bound)
        if context is None:
            return None
        try:
            feature = self._features.resolve(call.model, call.provider)
            code = context.feature_code or feature.feature_code
            estimate = self._estimate(call, code, uncalibrated=context.idempotency_key is not None)
            fingerprint = fingerprint_of(call) if context.idempotency_key is not None else ""
            return prepare(
                self.settings,
                context,
                code,
                context.feature_family_code or feature.family_code,
                estimate,
                model=call.model or None,
                fingerprint=fingerprint,
                background=background,
            )
        except VlunaError:
            raise
        except Exception:
            self.internal_error("vluna.begin")
            return None

    def _estimate(self, call: ModelCall, code: str, *, uncalibrated: bool) -> Estimate:
        """What authorize is told. A body that cannot be measured is billed all the same, by what was really used."""
        try:
            if uncalibrated:
                return self._estimator.uncalibrated(call.body, kind=call.kind)
            return self._estimator.predict(code, call.body, kind=call.kind)
        except Exception:
            self.internal_error("vluna.estimate")
            return Estimate(0, 0, "uncalibrated")

    def _prepare_work(self, work: CallContext, estimate: int) -> Prepared | None:
        if self._mode == "off":
            return None
        context = self._payer(work)
        if context is None:
            return None
        assert work.feature_code is not None
        return prepare(
            self.settings,
            context,
            work.feature_code,
            work.feature_family_code,
            None,
            quantity=estimate,
            fingerprint="work",
        )

    def _payer(self, bound: CallContext | None) -> CallContext | None:
        """Who pays: the bound client's context over the surrounding one over the settings."""
        context = current_context() if bound is None else current_context().override(bound)
        if context.principal_id is None and self.settings.principal is not None:
            preset = CallContext(principal_id=self.settings.principal, user_id=self.settings.user)
            context = preset.override(context)
        if context.principal_id is None:
            if self._mode == "enforce":
                raise MissingPrincipal
            self.telemetry.emit(
                "vluna.endpoint.unmetered",
                "warn",
                {"error.type": "MissingPrincipal"},
                message=f"{MissingPrincipal()} The call goes on, since the mode is 'observe'",
            )
            return None
        return context

    def _admit(self, prepared: Prepared) -> Operation | None:
        mode, admissions = self._mode, self._admissions
        try:
            if admissions.lacks_price(self._process, prepared):
                admissions.ask_price(self._process, prepared)
            admissions.store(self._process, prepared, mode, self._features)
            outcome: Lease | GateError | None = admissions.without_asking()
            if outcome is None:
                asked = authorize_arguments(prepared.row)
                try:
                    outcome = self._process.gate.authorize(**asked, deadline=self.settings.authorize_deadline)
                except GateError as error:
                    outcome = error
            return admissions.decide(self._process, prepared, outcome, mode)
        except BaseException as error:
            return admissions.rescue(self._process, prepared, error, mode)

    async def _aadmit(self, prepared: Prepared) -> Operation | None:
        mode, admissions = self._mode, self._admissions
        try:
            if admissions.lacks_price(self._process, prepared):
                await in_thread(admissions.ask_price, self._process, prepared)
            admissions.store(self._process, prepared, mode, self._features)
            outcome: Lease | GateError | None = admissions.without_asking()
            if outcome is None:
                asked, deadline = authorize_arguments(prepared.row), self.settings.authorize_deadline
                try:
                    outcome = await self._process.async_gate.authorize(**asked, deadline=deadline)
                except GateError as error:
                    outcome = error
            return admissions.decide(self._process, prepared, outcome, mode)
        except BaseException as error:
            return admissions.rescue(self._process, prepared, error, mode)

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _wrap(self, client: C, bound: CallContext | None) -> C:
        # The imports that go up: the facade is where users look for wrap(), the integrations know the clients.
        homes = [client.__name__] if isinstance(client, ModuleType) else [k.__module__ for k in type(client).__mro__]
        modules = {home.partition(".")[0] for home in homes}
        if "openai" in modules:
            integration = importlib.import_module("vluna_llm.integrations.openai")
        elif "anthropic" in modules:
            integration = importlib.import_module("vluna_llm.integrations.anthropic")
        else:
            raise ConfigurationError(
                f"Vluna.wrap does not know {type(client).__name__}; "
                "pass an openai client, the module openai, or an anthropic client."
            )
        wrapped: C = integration.wrap_client(self, client, bound)
        return wrapped

    def _running(self) -> Runtime:
        return self._process.running()


async def in_thread(function: Callable[..., object], *args: object) -> None:
    """Run it without holding up the loop, whichever kind of loop it is."""
    from anyio import to_thread

    await to_thread.run_sync(function, *args)


_default: Vluna | None = None
_default_guard = threading.Lock()


def _forked() -> None:
    global _default_guard
    _default_guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
