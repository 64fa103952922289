"""A real LiteLLM proxy: a process of its own, started from a ``config.yaml``, between a client and our upstream.

A virtual key of the proxy's own needs its database, and that needs Prisma's engines, which are downloaded when they are
first used. The stand-in, at the place that LiteLLM has for it (``custom_auth``): a function that tells team, user and
metadata from the key itself, as the database would. Everything after it is the proxy's own.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

MASTER_KEY = "sk-master"
START_SECONDS = 90.0
_ROOT = Path(__file__).parents[2]

_KEYS = """
import base64, json
from fastapi import HTTPException
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.auth import user_api_key_auth as auth

async def no_such_team(*args, **kwargs):
    raise HTTPException(404, "no such team")

if not hasattr(auth, "resolve_and_validate_end_user_id"):
    # 1.83 looks the team up in its database after custom auth, too, and refuses the key where it has no database:
    # it is told what it would be told by a database that has not heard of the team, and goes on with the key's own.
    auth.get_team_object = no_such_team

async def user_api_key_auth(request, api_key):
    key = api_key.removeprefix("Bearer ")
    if key == "sk-master":
        return UserAPIKeyAuth(api_key=key, user_id="default_user_id", user_role="proxy_admin")
    if not key.startswith("sk-test-"):
        raise Exception("unknown key")
    known = json.loads(base64.urlsafe_b64decode(key.removeprefix("sk-test-") + "==="))
    return UserAPIKeyAuth(api_key=key, **known)
"""

_CALLBACK = """
from vluna_llm.integrations.litellm import proxy_callback
"""


def key(**known: Any) -> str:
    """A key of which the proxy knows this: ``team_id``, ``user_id``, ``metadata``, ``team_metadata``, ..."""
    return "sk-test-" + base64.urlsafe_b64encode(json.dumps(known).encode()).decode().rstrip("=")


class LiteLLMProxy:
    """The process. ``settings`` are VLUNA_LLM_... variables, ``config`` the content of ``config.yaml``, ``modules`` the
    source of Python modules beside it."""

    def __init__(
        self,
        directory: Path,
        gate_env: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        modules: Mapping[str, str] | None = None,
        **settings: str,
    ) -> None:
        self.directory = directory
        self.log = directory / "proxy.log"
        self.port = _free_port()
        self._modules = {"vluna_keys": _KEYS, "vluna_callback": _CALLBACK, **(modules or {})}
        self._config = {
            **config,
            "litellm_settings": {"callbacks": "vluna_callback.proxy_callback", **config.get("litellm_settings", {})},
            "general_settings": {
                "master_key": MASTER_KEY,
                "custom_auth": "vluna_keys.user_api_key_auth",
                **config.get("general_settings", {}),
            },
        }
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))},
            **gate_env,
            **settings,
            "VLUNA_LLM_OUTBOX": str(directory / "outbox"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "NO_PROXY": "127.0.0.1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """What a client is given; without ``/v1``."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> LiteLLMProxy:
        """Start it and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, source in self._modules.items():
            (self.directory / f"{name}.py").write_text(source)
        config = self.directory / "config.yaml"
        config.write_text(json.dumps(self._config))  # JSON is YAML
        command = Path(sys.executable).with_name("litellm")
        program = [str(command)] if command.exists() else [shutil.which("litellm") or "litellm"]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                [*program, "--config", str(config), "--host", "127.0.0.1", "--port", str(self.port)],
                env=self._env,
                cwd=self.directory,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self._wait()
        return self

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.base_url}/health/liveliness", timeout=2.0).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        tail = self.log.read_text(errors="replace")[-4000:]
        self.stop()
        raise AssertionError(f"the proxy did not start:\n{tail}")

    def stop(self) -> None:
        """Ask it to stop, as an operator would, and wait."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
        self._process = None

    def __enter__(self) -> LiteLLMProxy:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
