"""A laboratory for the contract replay: one store, several server processes, the catalogue that the exchanges name.

Requests are signed here, by code of its own, and handed to the ASGI applications without a socket.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from vluna_llm.sandbox import catalogue
from vluna_llm.sandbox.app import GateApp
from vluna_llm.sandbox.clock import Clock
from vluna_llm.sandbox.records import Account, Meter, Policy, Realm, ServiceKey, User
from vluna_llm.sandbox.store import Store
from vluna_llm.sandbox.world import Options, World

REALM, REALM_2 = "realm-lab", "realm-lab2"
JSON_TYPE = "application/json; charset=utf-8"
DAY = 86_400
SIGNED = (
    "content-digest",
    "content-type",
    "x-realm-id",
    "x-principal-id",
    "x-user-id",
    "x-billing-account-id",
    "x-billing-user-id",
    "idempotency-key",
)

PROCESSES = {
    "main": Options(auto_registry=True),
    "second": Options(auto_registry=True),
    "third": Options(auto_registry=True),
    "short": Options(auto_registry=False, lease_ttl_seconds=2, grace_ms=3000),
    "sync": Options(auto_registry=True, ledger_sync=True),
    "dev": Options(auto_registry=True, production=False),
}


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: Any
    raw: bytes = b""


class Lab:
    """A realm with the catalogue of the captured server, and its processes."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.store = Store()
        self.keys: dict[str, tuple[str, str]] = {}
        self.world = World(self.store, PROCESSES["main"], self.clock)
        with self.store.transaction():
            for realm in (REALM, REALM_2, "realm-suspended", "realm-deleted"):
                status: Any = (
                    realm.removeprefix("realm-") if realm in ("realm-suspended", "realm-deleted") else "active"
                )
                self.store.realms.put(realm, Realm(realm, status))
            self.add_key("lab", REALM)
            self.add_key("lab2", REALM_2)
        self.apps = {name: GateApp(World(self.store, options, self.clock)) for name, options in PROCESSES.items()}

    def close(self) -> None:
        self.loop.close()

    # -- state ----------------------------------------------------------------------------------------------------

    def at(self, ms: int) -> None:
        """Set the clock that all processes share."""
        self.clock.hold(ms)

    def add_key(self, name: str, realm: str, **fields: Any) -> None:
        key_id, secret = f"pk-{secrets.token_hex(8)}", base64.b64encode(secrets.token_bytes(32)).decode()
        self.keys[name] = (key_id, secret)
        with self.store.transaction():
            self.store.keys.put(key_id, ServiceKey(key_id, secret, realm, **fields))

    def catalogue(self) -> None:
        """The features, meters and prices that the exchanges name."""
        std = "llm.standard"
        self.feature(
            "openai.gpt-4o",
            std,
            {"": (5, 2), ".tokens.input": (3, 2), ".tokens.output": (12, 8), ".tokens.cached_input": (1, 1)},
        )
        self.feature(
            "openai.gpt-4o-mini",
            std,
            {"": (2, 1), ".tokens.input": (2, 1), ".tokens.output": (4, 2), ".tokens.cached_input": (1, 1)},
        )
        for mode in ("floor", "nearest", "ceil"):
            self.feature(f"lab.block.{mode}", std, {"": (100, 60)}, unit=1000, rounding=mode)
        self.feature("lab.block.prepaid", std, {"": (100, 60)}, unit=1000, rounding="floor", residual="prepaid")
        self.feature("lab.free", std, {"": (0, 0)})
        self.feature("lab.inactive", std, {"": (5, 2)}, active=False)
        self.feature("lab.mixed", std, {"": (5, 2), ".won": None}, outcome=(".won",))
        self.feature("lab.partial", std, {"": (4, 2), ".a": (7, 3), ".b": None})
        self.feature("lab.unpriced", std, {"": None})
        self.feature("lab.premium", "llm.premium", {"": (5, 2)}, entitlement=True)
        self.feature("lab.denied", "llm.premium", {"": (5, 2)}, entitlement=True)

    def feature(
        self,
        code: str,
        family: str,
        meters: Mapping[str, tuple[int, int] | None],
        *,
        unit: int = 1,
        rounding: Any = "nearest",
        residual: Any = "none",
        outcome: tuple[str, ...] = (),
        active: bool = True,
        entitlement: bool = False,
    ) -> None:
        with self.store.transaction():
            catalogue.register_feature(self.world, REALM, code, family)
            for suffix, price in meters.items():
                meter = code + suffix
                kind: Any = "outcome" if suffix in outcome else "activity"
                self.store.meters.put(REALM, meter, Meter(meter, kind, residual))
                if price is not None:
                    catalogue.save_price(
                        self.world,
                        REALM,
                        meter,
                        price[0],
                        unit_quantity=unit,
                        rounding=rounding,
                        unit_cost_xusd=price[1],
                    )
            record = self.store.features.rows[(REALM, code)]
            codes = tuple(code + suffix for suffix in meters)
            record = replace(record, meters=codes, active=active, entitlement=entitlement)
            self.store.features.put(REALM, code, record)

    def change_feature(self, code: str, **changes: Any) -> None:
        with self.store.transaction():
            self.store.features.put(REALM, code, replace(self.store.features.rows[(REALM, code)], **changes))

    def customer(self, principal: str, credit: int = 0, user: str = "u1", realm: str = REALM, **changes: Any) -> User:
        """A known customer with a known user, topped up once."""
        with self.store.transaction():
            account, _ = self.world.ensure_account(realm, principal)
            if changes:
                self.store.accounts.put(realm, principal, replace(account, **changes))
            record = self.world.ensure_user(account, user)
            if credit:
                self.world.top_up(record, credit)
            return record

    def account(self, principal: str) -> Account:
        return self.store.accounts.rows[(REALM, principal)]

    def user(self, principal: str, user: str = "u1") -> User:
        return self.store.users.rows[(self.account(principal).account_id, user)]

    # -- requests -------------------------------------------------------------------------------------------------

    def send(
        self,
        process: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes = b"",
    ) -> Reply:
        return self.loop.run_until_complete(self.asend(process, method, path, headers, body))

    async def asend(self, process: str, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Reply:
        """One request to one process, as a server would hand it over: blanks at the ends of values are gone."""
        route, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(route),
            "raw_path": route.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": [(name.lower().encode(), value.strip(" ").encode("latin-1")) for name, value in headers.items()],
            "http_version": "1.1",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.apps[process](scope, receive, send)
        raw = b"".join(message.get("body", b"") for message in sent[1:])
        names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Reply(sent[0]["status"], names, json.loads(raw), raw)

    def headers(
        self,
        method: str,
        path: str,
        body: bytes,
        *,
        principal: str,
        user: str = "u1",
        key: str | None = None,
        realm: str = REALM,
        key_name: str = "lab",
    ) -> dict[str, str]:
        """The signed headers of a correct request."""
        out = {
            "content-digest": digest(body),
            "x-realm-id": realm,
            "content-type": JSON_TYPE,
            "x-principal-id": principal,
            "x-user-id": user,
            "idempotency-key": key or secrets.token_hex(8),
        }
        key_id, secret = self.keys[key_name]
        sig = sign(secret, method, path, "now", "n1", out)
        out["authorization"] = f"SVC-AUTH keyId={key_id},sig={sig},ts=now,nonce=n1,alg=HMAC-SHA256"
        return out

    def call(self, method: str, path: str, body: Any = None, *, process: str = "main", **who: Any) -> Any:
        """A correct request of the setup; its data, and an error for anything but success."""
        raw = b"" if body is None else json.dumps(body).encode()
        path = "/mgt/v1" + path
        reply = self.send(process, method, path, self.headers(method, path, raw, **who), raw)
        assert reply.status < 300, (path, reply.body)
        return reply.body["data"]

    def authorize(self, principal: str, feature: str = "openai.gpt-4o", *, process: str = "main", **more: Any) -> Any:
        """A lease; more holds body fields besides user, key and realm."""
        who = {name: more.pop(name) for name in ("user", "key", "realm", "key_name") if name in more}
        return self.call(
            "POST", "/gate/authorize", {"feature_code": feature, **more}, process=process, principal=principal, **who
        )

    def commit(self, principal: str, token: str, quantity: int, feature: str = "openai.gpt-4o", **more: Any) -> Any:
        who = {name: more.pop(name) for name in ("user", "key") if name in more}
        body = {"lease_token": token, "feature_code": feature, "quantity_minor": str(quantity), **more}
        return self.call("POST", "/gate/commits", body, principal=principal, **who)

    def cancel(self, principal: str, token: str, **who: Any) -> Any:
        return self.call("POST", "/gate/cancel", {"lease_token": token}, principal=principal, **who)

    def token(self, principal: str, user: str = "u1") -> str:
        """An end user's bearer token."""
        data = self.call("POST", "/token/issue", {"principal_id": principal, "user_id": user}, principal="cust_lab")
        return str(data["access_token"])


def policy(limit: int, feature: str | None = None, seconds: int = DAY, unit: str = "token", **more: Any) -> Policy:
    return Policy("quota", limit, seconds, feature, unit=unit, **more)


def rate(limit: int, feature: str | None = None, seconds: int = 60) -> Policy:
    return Policy("rate", limit, seconds, feature, unit="request")


def digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def canonical(method: str, target: str, ts: str, nonce: str, headers: Mapping[str, str]) -> str:
    parts = [method, target, "ts:" + ts, "nonce:" + nonce]
    return "\n".join(parts + [name + ":" + headers.get(name, "") for name in SIGNED])


def mac(secret: str, text: str) -> str:
    return base64.b64encode(hmac.new(base64.b64decode(secret), text.encode(), hashlib.sha256).digest()).decode()


def sign(secret: str, method: str, target: str, ts: str, nonce: str, headers: Mapping[str, str]) -> str:
    return mac(secret, canonical(method, target, ts, nonce, headers))
