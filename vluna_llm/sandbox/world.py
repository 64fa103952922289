"""What every part of the gate works with: the shared store, this process's options, the clock."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field, replace

from ..types import Dialect
from .clock import Clock
from .records import Account, Grant, Purse, User
from .store import Store


@dataclass(frozen=True, slots=True)
class Defaults:
    """What things get that nobody configured; prices in XUSD per unit, None for no price at all."""

    primary_xusd: int | None = None
    input_xusd: int | None = None
    cached_xusd: int | None = None
    output_xusd: int | None = None
    credit_xusd: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """How one server process behaves (gate contract, section 16); the defaults are those of the real server."""

    dialect: Dialect = "lease_token"
    auto_registry: bool = False
    lease_ttl_seconds: float = 43_200
    grace_ms: int = 60_000
    ledger_sync: bool = False
    production: bool = True
    first_call_fails: bool = True
    reject_colliding_keys: bool = False
    defaults: Defaults = field(default_factory=Defaults)


@dataclass(slots=True)
class World:
    """One server process: ``store`` may be shared with others, ``options`` are its own."""

    store: Store
    options: Options
    clock: Clock

    def now(self) -> int:
        """Milliseconds since the epoch, by the gate's clock."""
        return self.clock.now_ms()

    def account_of(self, realm_id: str, principal_id: str) -> Account | None:
        """The customer, if the realm has ever seen it."""
        return self.store.accounts.get(realm_id, principal_id)

    def ensure_account(self, realm_id: str, principal_id: str) -> tuple[Account, bool]:
        """The customer, created on first sight; the flag says whether it was."""
        account = self.account_of(realm_id, principal_id)
        if account is not None:
            return account, False
        account = Account(realm_id, principal_id, new_id(), self.now())
        self.store.accounts.put(realm_id, principal_id, account)
        return account, True

    def ensure_user(self, account: Account, user_id: str) -> User:
        """The user of a customer, created on first sight with the default credit."""
        user = self.store.users.get(account.account_id, user_id)
        if user is None:
            user = User(account.account_id, user_id, new_id(), self.now())
            self.store.users.put(account.account_id, user_id, user)
            if self.options.defaults.credit_xusd > 0:
                self.top_up(user, self.options.defaults.credit_xusd)
        return user

    def purse(self, billing_user_id: str) -> Purse:
        """The money of a user."""
        return self.store.purses.get(billing_user_id) or Purse()

    def top_up(self, user: User, xusd: int) -> Purse:
        """Add credit (negative: take it away) to the wallet grant that mirrors the ledger."""
        purse = self.purse(user.billing_user_id)
        grants = list(purse.grants)
        for index, grant in enumerate(grants):
            if grant.program == "wallet-cash":
                grants[index] = replace(grant, amount_xusd=grant.amount_xusd + xusd)
                break
        else:
            grants.append(Grant(new_id(), "cash", "wallet-cash", "Wallet Cash", xusd))
        purse = Purse(purse.ledger_xusd + xusd, tuple(grants))
        self.store.purses.put(user.billing_user_id, purse)
        return purse


def new_id() -> str:
    """A fresh uuid."""
    return str(uuid.uuid4())


def new_fingerprint() -> str:
    """64 hex digits, different every time."""
    return secrets.token_hex(32)
