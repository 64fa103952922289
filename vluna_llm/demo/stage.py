"""Where the demo plays: an embedded gate, the replay upstream and a wrapped client, all on loopback.

Nothing of the user's is touched: settings are given explicitly and the environment is not read for them, the journal
goes to a temporary directory, and the provider's key is a word that no provider would take.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import openai
from pydantic import SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from ..errors import ConfigurationError
from ..outbox.reading import journals_below, read_journal
from ..outbox.row import Row
from ..sandbox import Sandbox
from ..sandbox.replay import ReplayUpstream
from ..settings import Settings
from ..vluna import Vluna

AUTHORIZE_DEADLINE = 1.0
"""Seconds that an authorize may take with all its retries: short, so that a gate that is away is soon given up."""

EVENT_DELAY = 0.004
"""Seconds between two events of a replayed stream: a fast model, and slow enough for a caller to leave half way."""

NOT_A_KEY = "no-key-is-needed"


class IsolatedSettings(Settings):
    """Settings that come from arguments alone: whatever the environment holds, broken values included, is not read."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what was passed."""
        return (init_settings,)


class Stage:
    """Gate, upstream and metered clients, from ``__enter__`` to ``__exit__``.

    Raises:
        ConfigurationError: the recordings are not installed.
    """

    def __init__(self) -> None:
        self._exits = ExitStack()
        self.gate = Sandbox()
        try:
            self.upstream = ReplayUpstream(event_delay=EVENT_DELAY)
        except FileNotFoundError as error:
            raise ConfigurationError(f"The recorded answers are missing ({error}): install vluna-llm again.") from None
        self.recordings = {one.name: one for one in self.upstream.recordings}

    def __enter__(self) -> Stage:
        with ExitStack() as exits:
            exits.enter_context(self.gate)
            exits.enter_context(self.upstream)
            self.outbox = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="vluna-llm-demo-")))
            settings = IsolatedSettings(
                base_url=self.gate.base_url,
                realm_id=self.gate.realm_id,
                key_id=self.gate.key_id,
                key_secret=SecretStr(self.gate.key_secret),
                outbox=str(self.outbox),
                authorize_deadline=AUTHORIZE_DEADLINE,
            )
            self.vluna = exits.enter_context(Vluna(settings))
            self.client = self.vluna.wrap(
                openai.OpenAI(
                    **self._provider(), http_client=exits.enter_context(openai.DefaultHttpxClient(trust_env=False))
                )
            )
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def async_client(self) -> openai.AsyncOpenAI:
        """A metered client for the running event loop; the caller closes it."""
        return self.vluna.wrap(
            openai.AsyncOpenAI(**self._provider(), http_client=openai.DefaultAsyncHttpxClient(trust_env=False))
        )

    def journal(self) -> list[Row]:
        """The rows of this run's journal, in the order in which the operations began."""
        rows = [row for path in journals_below(self.outbox) for row in read_journal(path).rows]
        return sorted(rows, key=lambda row: row.created_at)

    def _provider(self) -> dict[str, Any]:
        # A replayed answer is the same on a second attempt, so the SDK's own retries would only blur the picture.
        return {"base_url": self.upstream.base_url, "api_key": NOT_A_KEY, "max_retries": 0}
