"""What the LiteLLM tests share: a gate, an upstream of ours, and a callback that is taken away after each test."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM otherwise asks the network for its price list
pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install 'litellm[proxy]'")
pytest.importorskip("uvicorn", reason="the embedded gate is not installed: pip install 'vluna-llm[sandbox]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
sys.path.insert(0, str(Path(__file__).parent))

import litellm
from books import TABLES, Books
from provider import Provider

from vluna_llm import Vluna
from vluna_llm.integrations import litellm as integration
from vluna_llm.sandbox import Sandbox

_customers = itertools.count(1)


# LiteLLM leaves a worker, its logging and unread answers in loops that have ended, and the garbage collector complains
# in whichever test comes next. Only these: whatever of ours cannot be raised still fails the test.
_LITELLMS_OWN = (
    # It resets a context variable of its own (`post_response_phase`) in the context of whoever collects it.
    "ignore:Exception ignored in. <coroutine object Logging.async_(success|failure)_handler"
    ":pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <coroutine object LoggingWorker:pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <function (ClientResponse|ClientSession|BaseConnector).__del__"
    ":pytest.PytestUnraisableExceptionWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What LiteLLM leaves behind is no failure of a test here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for rule in _LITELLMS_OWN:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Nor of the run as a whole: pytest collects once more after the last test, where no test's marks hold."""
    for rule in _LITELLMS_OWN:
        action, message, _ = rule.split(":")
        warnings.filterwarnings(action, message, pytest.PytestUnraisableExceptionWarning)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that the tests have filled."""
    for table in TABLES:
        terminalreporter.write_line("")
        for line in table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shared_gate() -> Iterator[Sandbox]:
    """One embedded gate for all tests that do not change it; every test has customers of its own."""
    with Sandbox() as gate:
        yield gate


@pytest.fixture(scope="session")
def _provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture
def provider(_provider: Provider) -> Provider:
    """The OpenAI-shaped upstream, well-behaved, with nothing asked of it yet."""
    _provider.behaviour = "ok"
    _provider.encoding = "identity"
    _provider.pause = 0.02
    _provider.requests.clear()
    _provider.flaked.clear()
    _provider.responses.clear()
    _provider.released.set()
    _provider.released.clear()
    return _provider


MakeVluna = Callable[..., Vluna]


@pytest.fixture
def make_vluna(shared_gate: Sandbox) -> Iterator[MakeVluna]:
    """Makes metering against the shared gate; closed after the test."""
    made: list[Vluna] = []

    def make(gate: Sandbox = shared_gate, **settings: Any) -> Vluna:
        vluna = Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
            **settings,
        )
        made.append(vluna)
        return vluna

    yield make
    for vluna in made:
        vluna.close()


@pytest.fixture
def vluna(make_vluna: MakeVluna) -> Vluna:
    """Metering with the default settings."""
    return make_vluna()


_LISTS = (
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
    "_async_input_callback",
    "service_callback",
)


@pytest.fixture(autouse=True)
def _litellm_as_it_was() -> Iterator[None]:
    """LiteLLM keeps its callbacks, cache and options in globals: each test finds them empty, and its functions bare."""
    yield
    integration.uninstall()
    vars(integration).pop("proxy_callback", None)
    for name in _LISTS:
        if isinstance(found := getattr(litellm, name, None), list):
            found.clear()
    litellm.cache = None
    litellm.num_retries = None
    litellm.model_fallbacks = None
    litellm.enable_preview_features = False


MakeCallback = Callable[..., Any]


@pytest.fixture
def make_callback() -> MakeCallback:
    """Makes a callback and puts it where a user puts it."""

    def make(vluna: Vluna, *others: Any, **options: Any) -> Any:
        callback = integration.VlunaCallback(vluna, **options)
        litellm.callbacks = [callback, *others]
        return callback

    return make


@pytest.fixture
def metered(vluna: Vluna, make_callback: MakeCallback) -> Vluna:
    """LiteLLM with our callback."""
    make_callback(vluna)
    return vluna


@pytest.fixture
def customer() -> str:
    """A customer whom no other test knows."""
    return f"litellm_customer_{next(_customers)}"


@pytest.fixture
def books(shared_gate: Sandbox, customer: str) -> Books:
    """What the gate has written down about that customer."""
    return Books(shared_gate, customer)
