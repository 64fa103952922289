"""The embedded gate for tests, demos and development: a real HTTP server on loopback with a gate's behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..errors import ConfigurationError
from . import budgets, catalogue
from .app import GateApp, Received
from .booked import Booked
from .clock import Clock
from .config import SandboxConfig, make_config, window_seconds
from .faults import Faults
from .furnish import ensure_meter, furnish, script
from .money import ResidualMode, Rounding
from .records import Account, BillingMode, Lease, Meter, Policy, User
from .routes import BASE
from .server import Listener
from .store import Store
from .world import World


class Sandbox:
    """A gate of one's own::

        with Sandbox() as gate:
            vluna = Vluna(base_url=gate.base_url, ...)      # or set gate.env() in the environment
            ...
            assert gate.booked("customer_123").charged_xusd == 42

    Without configuration every feature code works: unknown ones are registered with the default prices, and every
    new customer has the default credit. ``Sandbox(**STRICT)`` starts as a fresh real server does.

    Args:
        config: a :class:`SandboxConfig`, a mapping, a path of a TOML file, or None.
        host: a loopback address.
        port: 0 for a free one.
        overrides: settings by name, over those of ``config``.

    Raises:
        ConfigurationError: a setting is unknown or wrong, or the address cannot be used.
    """

    def __init__(
        self,
        config: SandboxConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        **overrides: Any,
    ) -> None:
        self.config = make_config(config, **overrides)
        self.clock = Clock()
        self.faults = Faults()
        try:
            self._store = Store(None if self.config.state == "memory" else Path(self.config.state))
        except (ValueError, OSError) as error:
            raise ConfigurationError(f"Setting 'state' is wrong: {error}.") from error
        self._world = World(self._store, self.config.options(), self.clock)
        self._key = furnish(self._world, self.config)
        script(self.faults, self.config)
        self.app = GateApp(self._world, self.faults)
        self._listener = Listener(self.app, host, port)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> Sandbox:
        """Listen; on the same port as before after a :meth:`stop`. State, keys and clock are kept."""
        self._listener.start()
        return self

    def stop(self) -> None:
        """Go away: the port is closed and every connection is cut. State is kept, :meth:`start` brings it back."""
        self._listener.stop()

    def close(self) -> None:
        """Stop for good and close the state file."""
        self.stop()
        self._store.close()

    def restart(self) -> None:
        """Stop and start as a new process would: the process's idempotency cache is forgotten, the store is not."""
        self.stop()
        self.app.restart()
        self.start()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = self.base_url if self._listener.port else "not started"
        return f"<Sandbox {where} realm={self.realm_id!r} dialect={self.config.dialect!r}>"

    # -- what a client needs -------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """Where a client finds the gate, e.g. ``http://127.0.0.1:4711/mgt/v1``."""
        host = f"[{self._listener.host}]" if ":" in self._listener.host else self._listener.host
        return f"http://{host}:{self._listener.port}{BASE}"

    @property
    def realm_id(self) -> str:
        """The realm."""
        return self.config.realm_id

    @property
    def key_id(self) -> str:
        """The id of the service key."""
        return self._key.key_id

    @property
    def key_secret(self) -> str:
        """The secret of the service key, base64."""
        return self._key.secret

    def env(self) -> dict[str, str]:
        """The four environment variables that point a client to this gate."""
        return {
            "VLUNA_SERVICE_BASE_URL": self.base_url,
            "VLUNA_REALM_ID": self.realm_id,
            "VLUNA_SERVICE_KEY_ID": self.key_id,
            "VLUNA_SERVICE_KEY_SECRET": self.key_secret,
        }

    # -- what happened -------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Received]:
        """The latest requests (at most 10,000), oldest first."""
        return list(self.app.requests)

    def booked(self, principal_id: str | None = None) -> Booked:
        """What was rated and charged for one customer, or for the whole realm."""
        with self._store.lock:
            rows = list(self._store.ratings.rows.values())
        return Booked.of(
            rating
            for rating in rows
            if rating.realm_id == self.realm_id and principal_id in (None, rating.principal_id)
        )

    def leases(self, principal_id: str | None = None) -> list[Lease]:
        """The leases that were handed out, oldest first."""
        with self._store.lock:
            account = None if principal_id is None else self._world.account_of(self.realm_id, principal_id)
            rows = list(self._store.leases.rows.values())
        if principal_id is None:
            return rows
        return [] if account is None else [lease for lease in rows if lease.account_id == account.account_id]

    def spendable(self, principal_id: str, user_id: str | None = None) -> int:
        """The XUSD that authorize would see for this customer."""
        with self._store.transaction():
            return self._world.purse(self._user(principal_id, user_id).billing_user_id).spendable_xusd

    def debt(self, principal_id: str, user_id: str | None = None) -> int:
        """The XUSD that were charged beyond the credit."""
        with self._store.transaction():
            purse = self._world.purse(self._user(principal_id, user_id).billing_user_id)
        return -sum(grant.remaining_xusd for grant in purse.grants if grant.kind == "fallback")

    # -- what an operator sets -----------------------------------------------------------------------------------

    def credit(self, principal_id: str, xusd: int, user_id: str | None = None) -> None:
        """Top up (negative: take away). ``user_id`` defaults to the principal: one purse per customer."""
        with self._store.transaction():
            self._world.top_up(self._user(principal_id, user_id), xusd)

    def set_credit(self, principal_id: str, xusd: int, user_id: str | None = None) -> None:
        """Make exactly ``xusd`` spendable, e.g. 0 for a customer who is out of credit."""
        with self._store.transaction():
            user = self._user(principal_id, user_id)
            self._world.top_up(user, xusd - self._world.purse(user.billing_user_id).spendable_xusd)

    def price(
        self,
        meter_code: str,
        unit_price_xusd: int,
        unit_quantity: int = 1,
        rounding: Rounding = "nearest",
        *,
        cost: int = 0,
        residual: ResidualMode = "none",
        feature: str | None = None,
    ) -> None:
        """Set the price of a meter: XUSD per ``unit_quantity`` units.

        A meter that does not exist is created for ``feature``, by default the part before ``.tokens.``, else a
        feature with the meter's own name.
        """
        with self._store.transaction():
            ensure_meter(self._world, self.realm_id, meter_code, feature)
            self._store.meters.put(self.realm_id, meter_code, Meter(meter_code, residual=residual))
            catalogue.save_price(
                self._world,
                self.realm_id,
                meter_code,
                unit_price_xusd,
                unit_quantity=unit_quantity,
                rounding=rounding,
                unit_cost_xusd=cost,
            )

    def unprice(self, meter_code: str) -> None:
        """Take the price of a meter away."""
        with self._store.transaction():
            ensure_meter(self._world, self.realm_id, meter_code)
            self._store.prices.delete(self.realm_id, meter_code)

    def feature(
        self,
        code: str,
        *,
        family: str | None = None,
        meters: tuple[str, ...] | list[str] | None = None,
        active: bool | None = None,
        entitlement: bool | None = None,
    ) -> None:
        """Create or change a feature; ``meters`` are those besides its primary one. None leaves things alone."""
        with self._store.transaction():
            found = catalogue.find_feature(self._world, self.realm_id, code)
            if found is None:
                found = catalogue.register_feature(self._world, self.realm_id, code, family)
            if meters is not None:
                for meter in meters:
                    if self._store.meters.get(self.realm_id, meter) is None:
                        self._store.meters.put(self.realm_id, meter, Meter(meter))
                found = replace(found, meters=tuple(dict.fromkeys((code, *meters))))
            found = replace(
                found,
                family=found.family if family is None else family,
                active=found.active if active is None else active,
                entitlement=found.entitlement if entitlement is None else entitlement,
            )
            self._store.features.put(self.realm_id, code, found)

    def quota(
        self,
        limit: int,
        *,
        feature: str | None = None,
        principal_id: str | None = None,
        window: int | str = "day",
        scope: Literal["user", "account"] = "user",
        unit: str = "token",
    ) -> None:
        """Limit the units per window, of one feature or of each, for one customer or for each."""
        self._policy(Policy("quota", limit, window_seconds(window), feature, scope, unit), principal_id)

    def rate(
        self,
        limit: int,
        *,
        feature: str | None = None,
        principal_id: str | None = None,
        window: int | str = "minute",
        scope: Literal["user", "account"] = "user",
    ) -> None:
        """Limit the authorizations per window."""
        self._policy(Policy("rate", limit, window_seconds(window), feature, scope, "request"), principal_id)

    def budget(self, principal_id: str, limit_xusd: int, *, name: str = "budget", reference: str | None = None) -> str:
        """Create a budget; returns its id. ``reference`` is the caller's own name of it, dialect B."""
        with self._store.transaction():
            account = self._account(principal_id)
            return budgets.create(self._world, account, name, limit_xusd, reference).budget_id

    def close_budget(self, budget_id: str) -> None:
        """Close a budget: leases that are bound to it can no longer be committed."""
        with self._store.transaction():
            budget = self._store.budgets.get(budget_id)
            if budget is None:
                raise KeyError(budget_id)
            self._store.budgets.put(budget_id, replace(budget, status="closed"))

    def customer(
        self,
        principal_id: str,
        *,
        billing_mode: BillingMode | None = None,
        grant: tuple[str, ...] = (),
        deny: tuple[str, ...] = (),
    ) -> None:
        """Create or change a customer: billing mode, and features that its plan grants or denies."""
        with self._store.transaction():
            account = self._account(principal_id)
            account = replace(
                account,
                billing_mode=billing_mode or account.billing_mode,
                granted=tuple(dict.fromkeys((*account.granted, *grant))),
                denied=tuple(dict.fromkeys((*account.denied, *deny))),
            )
            self._store.accounts.put(self.realm_id, principal_id, account)

    def revoke(self, principal_id: str, feature: str) -> None:
        """Withdraw a granted feature from a customer's plan."""
        with self._store.transaction():
            account = self._account(principal_id)
            kept = tuple(code for code in account.granted if code != feature)
            self._store.accounts.put(self.realm_id, principal_id, replace(account, granted=kept))

    def disable_user(self, principal_id: str, user_id: str | None = None, *, active: bool = False) -> None:
        """Disable a user (or enable it again): every call for it is refused with 403."""
        with self._store.transaction():
            user = self._user(principal_id, user_id)
            self._store.users.put(user.account_id, user.user_id, replace(user, active=active))

    # -- inside --------------------------------------------------------------------------------------------------

    def _policy(self, policy: Policy, principal_id: str | None) -> None:
        with self._store.transaction():
            if principal_id is None:
                realm = self._store.realms.rows[(self.realm_id,)]
                self._store.realms.put(self.realm_id, replace(realm, policies=(policy, *realm.policies)))
                return
            account = self._account(principal_id)
            account = replace(account, extra_policies=(policy, *account.extra_policies))
            self._store.accounts.put(self.realm_id, principal_id, account)

    def _account(self, principal_id: str) -> Account:
        return self._world.ensure_account(self.realm_id, principal_id)[0]

    def _user(self, principal_id: str, user_id: str | None) -> User:
        return self._world.ensure_user(self._account(principal_id), user_id or principal_id)
