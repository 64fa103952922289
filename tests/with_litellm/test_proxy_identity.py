"""Who pays for a request of the proxy: the mapping, its default, its mistakes, and what a client may not say."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import litellm
import pytest
from books import FEATURE, MESSAGES, MODEL, TOKENS, Books
from provider import Provider
from routers import chat, deployment, router
from upstream import Upstream

from vluna_llm import Vluna, call_context
from vluna_llm.context import CallContext
from vluna_llm.errors import ConfigurationError, MissingPrincipal
from vluna_llm.integrations._litellm_identity import (
    IDENTITY_VARIABLE,
    TRUST_VARIABLE,
    Identity,
    make_identity,
    strip_client_identity,
)

FIELDS = ("token", "key_alias", "team_id", "org_id", "user_id", "end_user_id", "metadata", "team_metadata")


def auth(**known: Any) -> Any:
    """What LiteLLM's authentication knows of a key."""
    return SimpleNamespace(**dict.fromkeys(FIELDS) | known)


def who(identity: Identity, known: Any, **data: Any) -> CallContext:
    """Who pays for a request."""
    return asyncio.run(identity.of(known, data))


# -- the default -------------------------------------------------------------------------------------------------------


def test_the_default_goes_from_the_key_to_the_user() -> None:
    """An entry of the key's metadata, then of the team's, then the team, then the user."""
    known = auth(
        metadata={"vluna": {"principal_id": "of the key"}},
        team_metadata={"vluna": "of the team"},
        team_id="team",
        user_id="user",
    )
    identity = make_identity()
    assert who(identity, known).principal_id == "of the key"
    known.metadata = {}
    assert who(identity, known).principal_id == "of the team"
    known.team_metadata = None
    assert who(identity, known).principal_id == "team"
    known.team_id = None
    assert who(identity, known).principal_id == "user"


def test_a_user_whom_a_header_names_pays_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM can take the key's user from a header: it is the client's word then, wherever it stands."""
    mappings = [{"header_name": "X-OpenWebUI-User-Id", "litellm_user_role": "internal_user"}]
    server = SimpleNamespace(general_settings={"user_header_mappings": mappings})
    monkeypatch.setitem(sys.modules, "litellm.proxy.proxy_server", server)
    known = auth(user_id="victim")
    assert who(make_identity(), known).principal_id is None
    assert (
        who(Identity(principal_id=("team_id",), user_id=("user_id",)), auth(team_id="t", user_id="v")).user_id is None
    )
    assert who(make_identity(trust_client=True), known).principal_id == "victim"
    server.general_settings = {"user_header_mappings": [{**mappings[0], "litellm_user_role": "customer"}]}
    assert who(make_identity(), known).principal_id == "victim"


def test_one_purse_for_each_customer_by_default() -> None:
    """The user of the proxy is no purse of its own, unless somebody says so."""
    assert who(make_identity(), auth(team_id="team", user_id="user")).user_id is None


@pytest.mark.parametrize("name", ["default_user_id", "litellm-dashboard", "litellm-internal-health-check"])
@pytest.mark.parametrize("field", ["user_id", "team_id"])
def test_litellm_itself_is_no_customer(field: str, name: str) -> None:
    """The holder of the master key, the dashboard and the health checks are nobody."""
    assert who(make_identity(), auth(**{field: name})).principal_id is None


def test_an_entry_says_more_than_who_pays() -> None:
    """The purse, the budget, the feature and labels; the team fills in what the key leaves open."""
    known = auth(
        metadata={"vluna": {"user_id": "purse", "labels": {"plan": "gold"}}},
        team_metadata={"vluna": {"principal_id": "acme", "feature_code": "chat", "labels": {"plan": "lead", "a": 1}}},
    )
    found = who(make_identity(), known)
    assert (found.principal_id, found.user_id, found.feature_code) == ("acme", "purse", "chat")
    assert dict(found.labels) == {"plan": "gold", "a": "1"}


@pytest.mark.parametrize(
    "entry", [{"principal": "x"}, {"principal_id": "é\u2603"}, {"principal_id": ""}, {"labels": 1}]
)
def test_an_entry_that_could_never_be_billed_is_a_mistake(entry: Any) -> None:
    """It is not taken for nobody: the operator is told."""
    with pytest.raises(ConfigurationError):
        who(make_identity(), auth(metadata={"vluna": entry}, team_id="team"))


# -- what the client writes --------------------------------------------------------------------------------------------


def test_the_client_names_at_most_the_end_user() -> None:
    """``user``, metadata and what LiteLLM made of them are a label and nothing else."""
    data = {"user": "eve", "metadata": {"vluna": {"principal_id": "rich"}}, "litellm_metadata": {"vluna": "rich"}}
    found = who(make_identity(), auth(team_id="team"), **data)
    assert (found.principal_id, found.user_id, found.end_user) == ("team", None, "eve")
    assert who(make_identity(), auth(team_id="team", end_user_id="bob"), user="eve").end_user == "bob"
    assert who(make_identity(), auth(end_user_id="rich")).principal_id is None


@pytest.mark.parametrize("word", ["\u2603", " x ", "x" * 300, "", 7, {"a": 1}])
def test_an_end_user_that_cannot_be_stored_refuses_nobody(word: Any) -> None:
    """The client's words are no reason to fail."""
    assert who(make_identity(), auth(team_id="team"), user=word).principal_id == "team"


def test_the_end_user_pays_only_where_clients_are_trusted() -> None:
    """LiteLLM reads it from the body and from headers."""
    with pytest.raises(ConfigurationError, match=TRUST_VARIABLE):
        make_identity("end_user_id, team_id")
    identity = make_identity("end_user_id, team_id", trust_client=True)
    assert who(identity, auth(end_user_id="eve", team_id="team")).principal_id == "eve"


def test_trusted_clients_may_name_the_customer() -> None:
    """In either metadata, also as text; without a word of theirs the key is asked."""
    identity = make_identity(trust_client=True)
    assert who(identity, auth(team_id="team"), metadata={"vluna": {"principal_id": "eve"}}).principal_id == "eve"
    assert who(identity, auth(team_id="team"), metadata=json.dumps({"vluna": "eve"})).principal_id == "eve"
    assert who(identity, auth(team_id="team"), metadata={"vluna": {"user_id": "purse"}}).user_id == "purse"
    assert who(identity, auth(team_id="team")).principal_id == "team"


def test_what_a_client_wrote_is_taken_out() -> None:
    """Everywhere where it would be read or passed on; what the proxy knows of the key is left as it is."""
    known = {"vluna": {"principal_id": "mine"}}
    data = {
        "metadata": {
            "vluna": {"principal_id": "x"},
            "mine": 1,
            "requester_metadata": {"vluna": 1, "kept": 2},
            "user_api_key_metadata": known,
            "headers": {"X-Vluna-Principal-Id": "x", "x-other": "y"},
        },
        "litellm_metadata": json.dumps({"vluna": "x", "a": {"b": 1}, "metadata": json.dumps({"vluna": 2, "c": 3})}),
        "extra_body": {"metadata": {"vluna": 1, "d": 4}},
        "headers": {"x-vluna-user-id": "x", "x-other": "y"},
    }
    strip_client_identity(data)
    assert data["metadata"] == {
        "mine": 1,
        "requester_metadata": {"kept": 2},
        "user_api_key_metadata": {"vluna": {"principal_id": "mine"}},
        "headers": {"x-other": "y"},
    }
    assert json.loads(data["litellm_metadata"]) == {"a": {"b": 1}, "metadata": json.dumps({"c": 3})}
    assert data["extra_body"] == {"metadata": {"d": 4}}
    assert data["headers"] == {"x-other": "y"}


@pytest.mark.parametrize("odd", [None, 7, "not json about vluna", "[1]", "\\u0000", [], {"metadata": None}])
def test_odd_metadata_is_left_alone(odd: Any) -> None:
    """Nothing of ours breaks a request."""
    data = {"metadata": copy.deepcopy(odd)}
    strip_client_identity(data)
    assert data == {"metadata": odd}


def test_an_escaped_name_is_seen_through() -> None:
    """JSON can write every letter as a number."""
    data: dict[str, Any] = {"metadata": '{"\\u0076luna": {"principal_id": "x"}, "a": 1}'}
    strip_client_identity(data)
    assert json.loads(data["metadata"]) == {"a": 1}


# -- how it is said ----------------------------------------------------------------------------------------------------


def test_the_environment_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ``proxy_callback``, which nobody constructs: names of fields, or JSON."""
    monkeypatch.setenv(IDENTITY_VARIABLE, "metadata.customer, org_id")
    assert who(make_identity(), auth(org_id="org", team_id="team")).principal_id == "org"
    assert who(make_identity(), auth(metadata={"customer": 17}, org_id="org")).principal_id == "17"
    monkeypatch.setenv(
        IDENTITY_VARIABLE, '{"principal_id": "team_id", "user_id": ["user_id"], "labels": {"key": "key_alias"}}'
    )
    found = who(make_identity(), auth(team_id="team", user_id="user", key_alias="laptop"))
    assert (found.principal_id, found.user_id, dict(found.labels)) == ("team", "user", {"key": "laptop"})
    monkeypatch.setenv(TRUST_VARIABLE, "true")
    assert make_identity().trust_client
    monkeypatch.setenv(TRUST_VARIABLE, "maybe")
    with pytest.raises(ConfigurationError, match="true or false"):
        make_identity()


@pytest.mark.parametrize("said", ["{", '{"principal": "x"}', "a,,b", '{"labels": {"a": 1}}', [1], 7])
def test_what_cannot_be_understood_is_one_sentence(said: Any) -> None:
    """At once, not at the first request."""
    with pytest.raises(ConfigurationError):
        make_identity(said)


def test_a_function_may_decide() -> None:
    """A plain one or a coroutine; a principal, a mapping, or nobody."""

    async def look_up(known: Any) -> Any:
        await asyncio.sleep(0)
        return {"principal_id": f"customer of {known.token}", "user_id": "purse"}

    found = who(make_identity(look_up), auth(token="abc"))
    assert (found.principal_id, found.user_id) == ("customer of abc", "purse")
    assert who(make_identity(lambda known: known.org_id), auth(org_id="org", team_id="t")).principal_id == "org"
    assert who(make_identity(lambda known: None), auth(team_id="team")).principal_id is None


# -- metadata of a call, in a program and in a proxy -------------------------------------------------------------------

ASKED: dict[str, Any] = {"model": f"openai/{MODEL}", "messages": MESSAGES, "api_key": "sk-test"}
AUTH = "litellm.proxy.auth.user_api_key_auth"


def ask(provider: Provider, is_async: bool, **more: Any) -> Any:
    """One call on LiteLLM's function."""
    given = {**ASKED, "api_base": provider.base_url, **more}
    return asyncio.run(litellm.acompletion(**given)) if is_async else litellm.completion(**given)


@pytest.fixture
def server() -> Any:
    """LiteLLM's proxy, imported by a program that does not run it."""
    pytest.importorskip("fastapi", reason="LiteLLM's proxy is not installed: pip install 'litellm[proxy]'")
    return pytest.importorskip("litellm.proxy.proxy_server", reason="pip install 'litellm[proxy]'")


@pytest.fixture
def serving(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, set up to run."""
    monkeypatch.setattr(server, "master_key", "sk-master")
    return server


BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_a_program_that_imports_the_proxy_is_none(
    server: Any, metered: Vluna, provider: Provider, books: Books, is_async: bool
) -> None:
    """Its own words count as in any other program."""
    ask(provider, is_async, metadata={"vluna": {"principal_id": books.customer}})
    books.settled(metered)
    books.once()


@BOTH
@pytest.mark.parametrize("entry", [{"principal_id": "victim"}, "victim", {"nonsense": 1}], ids=["named", "text", "odd"])
@pytest.mark.parametrize("bucket", ["metadata", "litellm_metadata"])
def test_metadata_names_nobody_in_a_proxy(
    serving: Any,
    metered: Vluna,
    provider: Provider,
    books: Books,
    caplog: pytest.LogCaptureFixture,
    is_async: bool,
    entry: Any,
    bucket: str,
) -> None:
    """A client may have written it: refused where nobody else is known, else billed to whom the program names."""
    with caplog.at_level(logging.WARNING, "vluna_llm"):
        for _ in range(2):
            with pytest.raises(MissingPrincipal):
                ask(provider, is_async, **{bucket: {"vluna": entry}})
    assert caplog.text.count("call_context") == 1
    assert provider.requests == []
    books.run(metered, lambda: ask(provider, is_async, **{bucket: {"vluna": entry}}))
    books.once()
    assert "vluna" not in json.dumps(provider.posts()[0].body)


def test_metadata_names_the_customer_in_a_proxy_that_trusts_its_clients(
    serving: Any, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """``trust_client_identity``: their word is as good as the operator's."""
    make_callback(vluna, trust_client_identity=True)
    ask(provider, True, metadata={"vluna": {"principal_id": books.customer}})
    books.settled(vluna)
    books.once()


def test_our_own_trace_is_no_clients_word(serving: Any, metered: Vluna, provider: Provider, books: Books) -> None:
    """LiteLLM's threads know nothing of the context: what we hand on in metadata counts in a proxy, too."""
    many = [MESSAGES, MESSAGES]

    def work() -> None:
        litellm.batch_completion(f"openai/{MODEL}", many, api_base=provider.base_url, api_key="sk-test")

    books.run(metered, work)
    assert books.charged == [(FEATURE, TOKENS)] * 2


@BOTH
def test_a_fallback_of_a_program_names_its_customer(metered: Vluna, books: Books, is_async: bool) -> None:
    """Where the program itself writes the fallback, that one is billed as it says."""
    with Upstream() as first, Upstream() as second:
        first.behaviour = "down"
        target = router([deployment(first), deployment(second, "other")], num_retries=0)
        fallback = {"model": "other", "metadata": {"vluna": {"principal_id": books.customer}}}
        with call_context(principal_id=f"not_{books.customer}"):
            chat(target, is_async=is_async, fallbacks=[fallback])
        books.settled(metered)
    books.once()
    assert Books(books.gate, f"not_{books.customer}").charged == []


# -- whose key it is, where no hook was asked --------------------------------------------------------------------------


@pytest.fixture
def authenticating(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The proxy's authentication, which knows one key."""
    module = ModuleType(AUTH)

    async def builder(known: Any) -> Any:
        return known

    module.user_api_key_auth_builder = builder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, AUTH, module)
    return module


def request_of(module: Any, known: Any, provider: Provider) -> None:
    """A request of the proxy on a route without hooks."""

    async def main() -> None:
        await module.user_api_key_auth_builder(known)
        await litellm.acompletion(**ASKED, api_base=provider.base_url, metadata={"vluna": {"principal_id": "victim"}})

    asyncio.run(main())


def test_the_key_pays_where_no_hook_was_asked(
    authenticating: Any, vluna: Vluna, make_callback: Any, provider: Provider, books: Books
) -> None:
    """By the same mapping, a coroutine function as well."""

    async def look_up(known: Any) -> Any:
        await asyncio.sleep(0)
        return known.team_id

    make_callback(vluna, identity=look_up)
    request_of(authenticating, auth(team_id=books.customer), provider)
    books.settled(vluna)
    books.once()


@pytest.mark.parametrize("known", [{}, {"metadata": {"vluna": {"nonsense": 1}}}], ids=["nobody", "mistake"])
def test_a_key_of_nobody_is_refused_where_no_hook_was_asked(
    authenticating: Any, metered: Vluna, provider: Provider, known: dict[str, Any]
) -> None:
    """With ``status_code`` 400, and no provider is asked."""
    with pytest.raises(ConfigurationError if known else MissingPrincipal) as caught:
        request_of(authenticating, auth(**known), provider)
    assert caught.value.status_code == 400  # type: ignore[attr-defined]
    assert provider.requests == []


@pytest.mark.parametrize("mode", ["observe", "off"])
def test_the_other_modes_refuse_no_key(
    authenticating: Any, make_vluna: Any, make_callback: Any, provider: Provider, mode: str
) -> None:
    """The call goes on, billed to nobody."""
    make_callback(make_vluna(mode=mode))
    request_of(authenticating, auth(metadata={"vluna": {"nonsense": 1}}), provider)
    assert len(provider.posts()) == 1


def test_the_authentication_is_put_back(authenticating: Any, metered: Vluna) -> None:
    """`uninstall` leaves nothing of ours in it."""
    from vluna_llm.integrations.litellm import uninstall

    ours = authenticating.user_api_key_auth_builder
    uninstall()
    assert authenticating.user_api_key_auth_builder is ours.__wrapped__


def test_a_moved_authentication_is_told(
    authenticating: Any, vluna: Vluna, make_callback: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator learns which routes are refused then."""
    del authenticating.user_api_key_auth_builder
    with caplog.at_level(logging.WARNING, "vluna_llm"):
        make_callback(vluna)
    assert AUTH in caplog.text
