"""Wrapped, bound, copied, dropped in: the client stays what it was, and meters once."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from conftest import Colour, MakeVluna, ask, each
from provider import Provider

import vluna_llm.vluna
from vluna_llm import Vluna, call_context
from vluna_llm.errors import ConfigurationError
from vluna_llm.integrations.openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI
from vluna_llm.sandbox import Sandbox

CHAT: Any = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}


def quantities(vluna: Vluna, gate: Sandbox, customer: str) -> list[tuple[str, int]]:
    """Feature and tokens of everything that the gate has booked."""
    assert vluna.flush(10)
    return [(entry.feature, entry.quantity) for entry in gate.booked(customer).entries]


async def chat(client: Any, **more: Any) -> Any:
    return await ask(client.chat.completions.create(**{**CHAT, **more}))


def test_a_wrapped_client_is_of_the_same_class(colour: Colour, vluna: Vluna) -> None:
    """isinstance, names and repr are the original's; the original is not."""
    bare = colour.bare()
    wrapped = vluna.wrap(bare)
    assert isinstance(wrapped, type(bare))
    assert wrapped is not bare
    assert type(wrapped).__name__ == type(bare).__name__
    assert type(wrapped).__qualname__ == type(bare).__qualname__
    assert type(wrapped).__module__ == type(bare).__module__
    assert repr(wrapped).split(" object")[0] == repr(bare).split(" object")[0]
    assert not hasattr(bare, "_vluna_metering")
    assert type(bare) in (openai.OpenAI, openai.AsyncOpenAI)


def test_the_original_stays_unmetered(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Also with resources that it had made before it was wrapped."""

    async def program(bare: Any) -> None:
        bare.chat.completions  # noqa: B018 - resources are made on first use and kept
        wrapped = vluna.wrap(bare)
        assert wrapped.chat is not bare.chat
        with call_context(principal_id=customer):
            await chat(bare)
            assert quantities(vluna, shared_gate, customer) == []
            await chat(wrapped)
            assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]

    colour.run(program, colour.bare())


def test_options_are_kept_and_the_connection_is_shared(colour: Colour, vluna: Vluna, provider: Provider) -> None:
    """Key, base URL, headers, query, time-out, retries, organization and the HTTP client."""
    bare = colour.bare(
        organization="org",
        project="proj",
        timeout=12.5,
        max_retries=7,
        default_headers={"x-mine": "1"},
        default_query={"q": "2"},
    )
    wrapped = vluna.wrap(bare)
    assert wrapped._client is bare._client
    for name in ("api_key", "base_url", "organization", "project", "timeout", "max_retries"):
        assert getattr(wrapped, name) == getattr(bare, name)

    async def program(client: Any) -> None:
        with call_context(principal_id="anybody"):
            await chat(client)

    colour.run(program, wrapped)
    (seen,) = provider.requests
    assert seen.headers["x-mine"] == "1"
    assert "q=2" in seen.path
    assert seen.headers["openai-organization"] == "org"


def test_wrapping_twice_meters_once(colour: Colour, vluna: Vluna, shared_gate: Sandbox, customer: str) -> None:
    """wrap(wrap(c)) is wrap(c)."""
    wrapped = vluna.wrap(colour.bare())
    assert vluna.wrap(wrapped) is wrapped
    colour.run(chat, vluna.bind(vluna.bind(wrapped, principal_id=customer), feature_code="sold.twice"))
    assert quantities(vluna, shared_gate, customer) == [("sold.twice", 120)]


def test_another_gate_takes_over(colour: Colour, vluna: Vluna, make_vluna: MakeVluna, customer: str) -> None:
    """A client that is wrapped by a second instance is metered by that one alone."""
    with Sandbox() as other:
        second = make_vluna(other)
        colour.run(chat, second.bind(vluna.bind(colour.bare(), principal_id="somebody_else"), principal_id=customer))
        assert quantities(second, other, customer) == [("openai.gpt-4o", 120)]
        assert len(other.leases()) == 1
        second.close()


def test_a_bound_client_wins_over_the_context_and_merges(
    colour: Colour, vluna: Vluna, shared_gate: Sandbox, customer: str
) -> None:
    """The inner binding wins; what it does not name is kept from the outer one."""
    first = vluna.bind(colour.bare(), principal_id="nobody_in_particular", feature_code="outer.feature")
    second = vluna.bind(first, principal_id=customer)

    async def program(client: Any) -> None:
        with call_context(principal_id="the_context", feature_code="the.context"):
            await chat(client)

    colour.run(program, second)
    assert quantities(vluna, shared_gate, customer) == [("outer.feature", 120)]


@pytest.mark.parametrize("method", ["copy", "with_options"])
def test_copies_are_metered_and_bound(
    method: str, colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """``with_options()`` and ``copy()`` of a metered client, and of its copies."""
    made = getattr(vluna.bind(colour.bare(), principal_id=customer), method)(max_retries=9)
    again = getattr(made, method)(default_headers={"x-copied": "1"})
    assert again.max_retries == 9
    assert isinstance(again, (openai.OpenAI, openai.AsyncOpenAI))
    colour.run(chat, again)
    assert provider.requests[0].headers["x-copied"] == "1"
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]


def test_a_client_made_from_the_class_of_a_metered_one_is_metered(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Some frameworks build ``type(client)(...)``; that must not be a way past the gate."""
    wrapped = vluna.wrap(colour.bare())

    async def program(client: Any) -> None:
        with call_context(principal_id=customer):
            await chat(client)

    colour.run(program, type(wrapped)(base_url=provider.base_url, api_key="sk"))
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]


class Tenanted(openai.OpenAI):
    """A product's own client, with a constructor argument and a request hook of its own."""

    def __init__(self, tenant: str, **options: Any) -> None:
        self.tenant = tenant
        self.hooked = 0
        super().__init__(**options)

    def copy(self, **options: Any) -> Tenanted:
        extra = {"tenant": self.tenant, **options.pop("_extra_kwargs", {})}
        return super().copy(_extra_kwargs=extra, **options)

    with_options = copy

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self.hooked += 1
        return super().request(*args, **kwargs)


class Stubborn(openai.OpenAI):
    """A product's own client whose copies are of a class that it names itself."""

    def with_options(self, **options: Any) -> Stubborn:
        return Stubborn(api_key=self.api_key, base_url=self.base_url, **options)


def test_a_subclass_of_the_products_own(vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str) -> None:
    """Its constructor, its attributes, its overridden methods and its copies work as before."""
    own = Tenanted("acme", base_url=provider.base_url, api_key="sk")
    bound = vluna.bind(own, principal_id=customer)
    assert isinstance(bound, Tenanted)
    assert bound.tenant == "acme"
    bound.chat.completions.create(**CHAT)
    assert (bound.hooked, own.hooked) == (1, 0)
    copied = bound.with_options(max_retries=4)
    assert (copied.tenant, copied.max_retries) == ("acme", 4)
    copied.chat.completions.create(**CHAT)
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)] * 2
    own.close()


def test_a_subclass_that_names_itself_when_copied(
    vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Its copies are wrapped again."""
    bound = vluna.bind(Stubborn(base_url=provider.base_url, api_key="sk"), principal_id=customer)
    copied = bound.with_options(max_retries=1)
    assert isinstance(copied, Stubborn)
    copied.chat.completions.create(**CHAT)
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]
    bound.close()
    copied.close()


def test_a_method_set_on_the_instance_does_not_lead_past_the_gate(
    vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """An instance patched by somebody else (``client.request = ...``) is metered all the same."""
    bare = openai.OpenAI(base_url=provider.base_url, api_key="sk")
    bare.request = bare.request  # type: ignore[method-assign]
    bound = vluna.bind(bare, principal_id=customer)
    bound.chat.completions.create(**CHAT)
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]
    bare.close()


def test_pickling_fails_loudly(colour: Colour, vluna: Vluna) -> None:
    """A client holds locks and sockets and cannot travel; a metered one does not arrive somewhere unmetered either."""
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(vluna.wrap(colour.bare()))


def test_a_shallow_copy_is_metered(colour: Colour, vluna: Vluna, shared_gate: Sandbox, customer: str) -> None:
    """``copy.copy`` of a metered client, with and without resources in use."""
    bound = vluna.bind(colour.bare(), principal_id=customer)
    bound.responses  # noqa: B018
    colour.run(chat, copy.copy(bound))
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)]


def test_bound_clients_are_freed(colour: Colour, vluna: Vluna) -> None:
    """A client per web request leaves neither itself nor a class behind."""
    bare = colour.bare()
    base = type(bare)
    before = len(base.__subclasses__())
    gone = [weakref.ref(vluna.bind(bare, principal_id=f"c{index}")) for index in range(50)]
    gc.collect()
    assert [ref for ref in gone if ref() is not None] == []
    assert len(base.__subclasses__()) <= before + 1


def test_strangers_are_refused_clearly(vluna: Vluna) -> None:
    """What is not a client cannot be wrapped."""
    with pytest.raises(ConfigurationError, match="object"):
        vluna.wrap(object())
    with pytest.raises(ConfigurationError):
        vluna.wrap(openai.OpenAI)


# -- Azure -----------------------------------------------------------------------------------------------------------


def azure(colour: Colour, provider: Provider, kinds: Any = (openai.AzureOpenAI, openai.AsyncAzureOpenAI)) -> Any:
    """A client of Azure's flavour."""
    return kinds[colour.is_async](azure_endpoint=provider.host, api_key="sk", api_version="2026-01-01", max_retries=0)


def test_azure_is_metered_by_deployment(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """The deployment stands in the URL; the feature code is ``azure.<deployment>``; streams and copies too."""

    async def program(client: Any) -> None:
        await chat(client, model="my-deployment")
        async for _ in each(await chat(client.with_options(timeout=30), model="my-deployment", stream=True)):
            pass

    colour.run(program, vluna.bind(azure(colour, provider), principal_id=customer))
    assert all("/openai/deployments/my-deployment/chat/completions" in seen.path for seen in provider.requests)
    assert quantities(vluna, shared_gate, customer) == [("azure.my-deployment", 120)] * 2


def test_azure_with_the_deployment_in_the_client(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """``azure_deployment=`` and a model that is only a name."""
    kind = openai.AsyncAzureOpenAI if colour.is_async else openai.AzureOpenAI
    bare = kind(azure_endpoint=provider.host, azure_deployment="dep", api_key="sk", api_version="v", max_retries=0)
    colour.run(chat, vluna.bind(bare, principal_id=customer))
    assert quantities(vluna, shared_gate, customer) == [("azure.gpt-4o", 120)]


# -- drop-in classes -------------------------------------------------------------------------------------------------


def test_the_drop_in_classes_meter(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """One changed import line; copies keep the metering; ``bind`` works on them."""
    kind = AsyncOpenAI if colour.is_async else OpenAI
    client = kind(base_url=provider.base_url, api_key="sk", vluna=vluna)
    assert isinstance(client, openai.AsyncOpenAI if colour.is_async else openai.OpenAI)

    async def program(client: Any) -> None:
        with call_context(principal_id=customer):
            await chat(client)
            await chat(client.with_options(max_retries=1))
        await chat(vluna.bind(client, principal_id=customer).copy())

    colour.run(program, client)
    assert quantities(vluna, shared_gate, customer) == [("openai.gpt-4o", 120)] * 3


def test_the_drop_in_azure_classes_meter(
    colour: Colour, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """As above, for Azure."""
    kind = AsyncAzureOpenAI if colour.is_async else AzureOpenAI
    client = kind(azure_endpoint=provider.host, api_key="sk", api_version="v", vluna=vluna)

    async def program(client: Any) -> None:
        with call_context(principal_id=customer):
            await chat(client)
            await chat(client.copy(max_retries=1))

    colour.run(program, client)
    assert quantities(vluna, shared_gate, customer) == [("azure.gpt-4o", 120)] * 2


@pytest.fixture
def _fresh_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(vluna_llm.vluna, "_default", None)
    yield
    made = vluna_llm.vluna._default
    if made is not None:
        made.close()


@pytest.mark.usefixtures("_fresh_default")
def test_the_drop_in_classes_take_the_environment(
    colour: Colour, provider: Provider, shared_gate: Sandbox, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an argument the process's own instance is used."""
    for name, value in {**shared_gate.env(), "VLUNA_LLM_OUTBOX": "memory", "VLUNA_LLM_PRINCIPAL": customer}.items():
        monkeypatch.setenv(name, value)
    kind = AsyncOpenAI if colour.is_async else OpenAI
    colour.run(chat, kind(base_url=provider.base_url, api_key="sk"))
    assert quantities(Vluna.default(), shared_gate, customer) == [("openai.gpt-4o", 120)]


@pytest.mark.usefixtures("_fresh_default")
def test_the_drop_in_classes_say_what_is_missing(provider: Provider) -> None:
    """Nothing configured: said when the client is made, not when the first customer calls."""
    with pytest.raises(ConfigurationError, match="VLUNA_SERVICE_BASE_URL"):
        OpenAI(base_url=provider.base_url, api_key="sk")


def test_without_the_sdk_the_extra_is_named() -> None:
    """The import error says what to install; the package itself imports without the SDK."""
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "import vluna_llm; vluna_llm.Vluna\n"
        "try:\n    import vluna_llm.integrations.openai\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vluna-llm[openai]" in done.stdout


# -- the module itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def _module(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = ("_client", "_ModuleClient", "_AzureModuleClient", "_BedrockModuleClient", "http_client", "api_type")
    kept = {name: getattr(openai, name) for name in names if hasattr(openai, name)}
    monkeypatch.setattr(openai, "api_key", "sk")
    monkeypatch.setattr(openai, "base_url", provider.base_url + "/")
    monkeypatch.setattr(openai, "max_retries", 0)
    openai._client = None  # type: ignore[attr-defined]
    yield
    for name, value in kept.items():
        setattr(openai, name, value)


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize("used_before", [False, True])
def test_the_module_is_metered(
    used_before: bool, vluna: Vluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """``vluna.wrap(openai)``: module-level calls, also when the module was used before, and settings set later."""
    if used_before:
        openai.chat.completions.create(**CHAT)
    assert vluna.wrap(openai) is openai
    assert vluna.wrap(openai) is openai
    openai.api_key = "sk-later"
    with call_context(principal_id=customer):
        openai.chat.completions.create(**CHAT)
        for _ in openai.chat.completions.create(**CHAT, stream=True):
            pass
        openai.responses.create(model="gpt-4o", input="hi")
        openai.embeddings.create(model="text-embedding-3-small", input="hi")
    assert provider.requests[-1].headers["authorization"] == "Bearer sk-later"
    booked = quantities(vluna, shared_gate, customer)
    assert booked == [("openai.gpt-4o", 120)] * 3 + [("openai.text-embedding-3-small", 8)]


@pytest.mark.usefixtures("_module")
def test_the_module_changes_hands(
    vluna: Vluna, make_vluna: MakeVluna, provider: Provider, shared_gate: Sandbox, customer: str
) -> None:
    """Wrapped by a second instance it is metered once, by that one."""
    vluna.wrap(openai)
    openai.models.list()
    second = make_vluna()
    second.wrap(openai)
    with call_context(principal_id=customer):
        openai.chat.completions.create(**CHAT)
    assert quantities(second, shared_gate, customer) == [("openai.gpt-4o", 120)]


@pytest.mark.usefixtures("_module")
def test_the_module_cannot_be_bound_to_one_customer(vluna: Vluna) -> None:
    """It is shared by the whole process."""
    with pytest.raises(ConfigurationError, match="call_context"):
        vluna.bind(openai, principal_id="alice")
