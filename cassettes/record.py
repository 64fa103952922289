"""Record the cassettes: real SDKs against servers that run, through vcrpy.

    python cassettes/record.py --llama-server http://127.0.0.1:8080 --llama-server-embeddings http://127.0.0.1:8081 \\
        --llama-cpp-python http://127.0.0.1:8000 --litellm http://127.0.0.1:4000

Each URL is the root of a running server (README.md has the command lines); only the servers that are named are
recorded, and only the scenarios that `--only` names, where it is given. The servers' key is read from
`RECORDING_KEY`. Needs `openai`, `anthropic` and `vcrpy`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anthropic
import bundle
import openai
import vcr
import yaml
from openai.types.chat import ChatCompletionMessageParam

HERE = Path(__file__).resolve().parent
KEY = os.environ.get("RECORDING_KEY", "sk-recording-only")
WRONG_KEY = "sk-not-a-key-of-this-server"

# Bodies as the server wrote them, and no kept-alive connection that the server may close under us.
SENT_HEADERS = {"Accept-Encoding": "identity", "Connection": "close"}
KEPT_REQUEST_HEADERS = {"accept", "content-type", "anthropic-version"}
KEPT_RESPONSE_HEADERS = {"content-type", "date", "server", "x-request-id", "retry-after", "x-litellm-version"}
# The port that each server listens on by default: the recording does not tell where it really ran.
USUAL_PORT = {
    "llama-server": 8080,
    "llama-server-embeddings": 8081,
    "llama-cpp-python": 8000,
    "llama-cpp-python-tools": 8001,
    "litellm": 4000,
}

SMALL = "smollm2-135m-instruct"
EMBED = "smollm2-135m-embed"
LEGACY = "smollm2-135m-legacy"
TOOLS = "smollm2-135m-tools"
FAST, QUALITY, LIMITED = "smollm2-fast", "smollm2-quality", "smollm2-limited"

SUPPORT = (
    "You are the friendly support desk of Lighthouse, a shop for board games and puzzles. Orders leave the warehouse "
    "within two working days. Parcels inside the country take three days, parcels abroad take seven. Unopened games "
    "can be returned within thirty days; missing pieces are replaced free of charge. The shop is open from nine to "
    "five, Monday to Friday. Answer in one or two short sentences, be polite, and never invent an order number."
)
QUESTIONS = [
    "What is a lighthouse for?",
    "Give me a name for a shop that sells tea.",
    "Explain in one sentence why the sky is blue.",
    "Write a two-line poem about autumn.",
    "Name three things to pack for a day at the beach.",
    "How do I keep bread fresh?",
]
TURNS = [
    "Hello! How long does a parcel inside the country take?",
    "And a parcel to a friend abroad?",
    "One piece of my puzzle is missing. What can I do?",
    "Thank you. When are you open?",
]
STORY = "Tell me a long story about a small boat that wants to see the ocean."
WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city today",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
FRUIT_SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "fruit",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "sweet": {"type": "boolean"}},
            "required": ["name", "sweet"],
            "additionalProperties": False,
        },
    },
}
WITH_USAGE: Any = {"include_usage": True}

Scenario = Callable[[openai.OpenAI], None]
SCENARIOS: dict[str, dict[str, Scenario]] = {}


def scenario(*servers: str) -> Callable[[Scenario], Scenario]:
    """Register a function as the scenario of that name for these servers: one cassette each."""

    def register(function: Scenario) -> Scenario:
        for server in servers:
            SCENARIOS.setdefault(server, {})[function.__name__] = function
        return function

    return register


def user(text: str) -> list[ChatCompletionMessageParam]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def drain(stream: Any) -> None:
    """Read a stream to its end."""
    for _ in stream:
        pass


def refused(call: Callable[[], Any], *statuses: int) -> None:
    """Make a call that must be refused with one of these statuses."""
    try:
        call()
    except openai.APIStatusError as error:
        if error.status_code in statuses:
            return
        raise
    raise SystemExit(f"expected one of {statuses}, but the server answered")


# ---- the native llama-server ---------------------------------------------------------------------------------------


@scenario("llama-server")
def chat_plain(client: openai.OpenAI) -> None:
    for question in QUESTIONS:
        client.chat.completions.create(model=SMALL, messages=user(question), max_tokens=60)


@scenario("llama-server")
def chat_stream(client: openai.OpenAI) -> None:
    for question in QUESTIONS:
        messages = user(question)
        drain(
            client.chat.completions.create(
                model=SMALL,
                messages=messages,
                max_tokens=60,
                stream=True,
                stream_options=WITH_USAGE,
            )
        )


@scenario("llama-server")
def chat_stream_without_usage(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:2]:
        drain(client.chat.completions.create(model=SMALL, messages=user(question), max_tokens=60, stream=True))


@scenario("llama-server")
def chat_stream_long(client: openai.OpenAI) -> None:
    drain(
        client.chat.completions.create(
            model=SMALL, messages=user(STORY), max_tokens=160, stream=True, stream_options=WITH_USAGE
        )
    )


def _conversation(client: openai.OpenAI, *, stream: bool, system: str) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}]
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        if stream:
            text = ""
            for chunk in client.chat.completions.create(
                model=SMALL, messages=messages, max_tokens=50, stream=True, stream_options=WITH_USAGE
            ):
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        else:
            done = client.chat.completions.create(model=SMALL, messages=messages, max_tokens=50)
            text = done.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})


@scenario("llama-server")
def chat_turns_cached(client: openai.OpenAI) -> None:
    _conversation(client, stream=False, system=SUPPORT)


@scenario("llama-server")
def chat_turns_cached_stream(client: openai.OpenAI) -> None:
    _conversation(client, stream=True, system="Today is a quiet day. " + SUPPORT)


@scenario("llama-server")
def chat_with_tools(client: openai.OpenAI) -> None:
    """This template knows no tools: they are accepted, read by nobody, and answered in words."""
    client.chat.completions.create(
        model=SMALL,
        messages=user("What is the weather in Paris, in celsius?"),
        tools=[WEATHER_TOOL],
        tool_choice="auto",
        max_tokens=40,
    )


@scenario("llama-server")
def chat_json_schema(client: openai.OpenAI) -> None:
    messages = user("Describe an apple as JSON with its name and whether it is sweet.")
    client.chat.completions.create(model=SMALL, messages=messages, response_format=FRUIT_SCHEMA, max_tokens=60)
    # Cut off in the middle of the JSON: finish_reason is length, and the tokens were spent all the same.
    client.chat.completions.create(model=SMALL, messages=messages, response_format=FRUIT_SCHEMA, max_tokens=4)


@scenario("llama-server")
def responses_plain(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:4]:
        client.responses.create(model=SMALL, input=question, max_output_tokens=60)


@scenario("llama-server")
def responses_stream(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:4]:
        drain(client.responses.create(model=SMALL, input=question, max_output_tokens=60, stream=True))


@scenario("llama-server")
def responses_cached(client: openai.OpenAI) -> None:
    for question in TURNS[:2]:
        client.responses.create(model=SMALL, instructions=SUPPORT, input=question, max_output_tokens=50)
    for question in TURNS[2:]:
        drain(
            client.responses.create(
                model=SMALL, instructions=SUPPORT, input=question, max_output_tokens=50, stream=True
            )
        )


@scenario("llama-server")
def responses_input_tokens(client: openai.OpenAI) -> None:
    """Counts tokens without a model call: the number in the answer is not usage."""
    client.post("/responses/input_tokens", cast_to=object, body={"model": SMALL, "input": QUESTIONS[0]})


@scenario("llama-server")
def completions_plain(client: openai.OpenAI) -> None:
    for prompt in ("The capital of France is", "A recipe for pancakes begins with"):
        client.completions.create(model=SMALL, prompt=prompt, max_tokens=30)


@scenario("llama-server")
def completions_stream(client: openai.OpenAI) -> None:
    drain(
        client.completions.create(
            model=SMALL, prompt="Once upon a time", max_tokens=40, stream=True, stream_options=WITH_USAGE
        )
    )


@scenario("llama-server")
def models(client: openai.OpenAI) -> None:
    client.models.list()


@scenario("llama-server")
def messages_plain(client: openai.OpenAI) -> None:
    claude = anthropic_client(client)
    for _ in range(2):  # the second reads what the first left in the cache
        claude.messages.create(
            model=SMALL, system=SUPPORT, max_tokens=40, messages=[{"role": "user", "content": TURNS[0]}]
        )


@scenario("llama-server")
def messages_stream(client: openai.OpenAI) -> None:
    claude = anthropic_client(client)
    drain(
        claude.messages.create(
            model=SMALL, max_tokens=40, messages=[{"role": "user", "content": QUESTIONS[3]}], stream=True
        )
    )


@scenario("llama-server")
def errors(client: openai.OpenAI) -> None:
    chat = client.chat.completions
    bad: Any = [{"role": "user", "content": [{"type": "hologram"}]}]
    refused(lambda: chat.create(model=SMALL, messages=bad), 400, 500)
    refused(lambda: chat.create(model=SMALL, messages=user("Say hello."), n=2), 400)
    too_long = user("boat " * 1100)
    refused(lambda: chat.create(model=SMALL, messages=too_long), 400)
    refused(lambda: client.post("/nothing/here", cast_to=object, body={"model": SMALL}), 404)
    refused(lambda: client.with_options(api_key=WRONG_KEY).chat.completions.create(model=SMALL, messages=bad), 401)


@scenario("llama-server-embeddings")
def embeddings(client: openai.OpenAI) -> None:
    client.embeddings.create(model=EMBED, input="A lighthouse shows ships the way.")
    client.embeddings.create(model=EMBED, input=["Tea", "A day at the beach", "How do I keep bread fresh?"])


# ---- llama-cpp-python's server: ignores include_usage ---------------------------------------------------------------


@scenario("llama-cpp-python")
def legacy_chat_plain(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:2]:
        client.chat.completions.create(model=LEGACY, messages=user(question), max_tokens=40)


@scenario("llama-cpp-python")
def legacy_chat_stream_ignores_include_usage(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:3]:
        drain(
            client.chat.completions.create(
                model=LEGACY, messages=user(question), max_tokens=40, stream=True, stream_options=WITH_USAGE
            )
        )


@scenario("llama-cpp-python")
def legacy_completions(client: openai.OpenAI) -> None:
    client.completions.create(model=LEGACY, prompt="The capital of France is", max_tokens=20)
    drain(
        client.completions.create(
            model=LEGACY, prompt="Once upon a time", max_tokens=20, stream=True, stream_options=WITH_USAGE
        )
    )


@scenario("llama-cpp-python")
def legacy_errors(client: openai.OpenAI) -> None:
    chat = client.chat.completions
    refused(lambda: chat.create(model=LEGACY, messages=user("boat " * 1100)), 400)
    refused(lambda: client.with_options(api_key=WRONG_KEY).chat.completions.create(model=LEGACY, messages=[]), 401)


@scenario("llama-cpp-python-tools")
def tool_call(client: openai.OpenAI) -> None:
    chosen: Any = {"type": "function", "function": {"name": "get_weather"}}
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model=TOOLS,
            messages=user("What is the weather in Paris, in celsius?"),
            tools=[WEATHER_TOOL],
            tool_choice=chosen,
            max_tokens=80,
            stream=stream,
            **({"stream_options": WITH_USAGE} if stream else {}),
        )
        if stream:
            drain(answer)


# ---- the LiteLLM proxy in front of the native server ----------------------------------------------------------------


@scenario("litellm")
def proxy_chat_plain(client: openai.OpenAI) -> None:
    for model in (FAST, QUALITY):
        for question in QUESTIONS[:2]:
            client.chat.completions.create(model=model, messages=user(question), max_tokens=50)


@scenario("litellm")
def proxy_chat_stream(client: openai.OpenAI) -> None:
    for model in (FAST, QUALITY):
        for question in QUESTIONS[:2]:
            drain(
                client.chat.completions.create(
                    model=model, messages=user(question), max_tokens=50, stream=True, stream_options=WITH_USAGE
                )
            )


@scenario("litellm")
def proxy_chat_stream_without_usage(client: openai.OpenAI) -> None:
    drain(client.chat.completions.create(model=FAST, messages=user(QUESTIONS[0]), max_tokens=50, stream=True))


@scenario("litellm")
def proxy_turns_cached(client: openai.OpenAI) -> None:
    for turn in TURNS[:2]:
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": "Be brief. " + SUPPORT},
            {"role": "user", "content": turn},
        ]
        client.chat.completions.create(model=QUALITY, messages=messages, max_tokens=40)


@scenario("litellm")
def proxy_responses_plain(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:2]:
        client.responses.create(model=QUALITY, input=question, max_output_tokens=50)


@scenario("litellm")
def proxy_responses_stream(client: openai.OpenAI) -> None:
    for question in QUESTIONS[:2]:
        drain(client.responses.create(model=QUALITY, input=question, max_output_tokens=50, stream=True))


@scenario("litellm")
def proxy_errors(client: openai.OpenAI) -> None:
    refused(lambda: client.chat.completions.create(model="no-such-model", messages=user("Hello")), 400, 404)
    refused(lambda: client.with_options(api_key=WRONG_KEY).models.list(), 400, 401)
    refused(lambda: client.chat.completions.create(model=FAST, messages=user("boat " * 1100)), 400)


@scenario("litellm")
def proxy_rate_limited(client: openai.OpenAI) -> None:
    for _ in range(3):
        with suppress(openai.RateLimitError):
            client.chat.completions.create(model=LIMITED, messages=user("Hello"), max_tokens=10)


# ---- how it is recorded ---------------------------------------------------------------------------------------------


def anthropic_client(client: openai.OpenAI) -> anthropic.Anthropic:
    """The same server through the other SDK."""
    root = str(client.base_url).removesuffix("/").removesuffix("/v1")
    return anthropic.Anthropic(base_url=root, api_key=KEY, max_retries=0, default_headers=SENT_HEADERS)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, so that an event stream can be read and compared by eye."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


class ReadableYaml:
    """vcrpy's YAML form, written readably; any vcrpy reads it."""

    @staticmethod
    def serialize(cassette: dict[str, Any]) -> str:
        text = yaml.dump(cassette, Dumper=_Dumper, allow_unicode=True, width=10**9, sort_keys=False)
        if yaml.safe_load(text) != cassette:
            raise ValueError("the cassette would not be read back as it was recorded")
        for private in (str(HERE.parent), os.getcwd(), str(Path.home()), socket.gethostname()):
            if len(private) > 1 and re.search(rf"(?<![\w/]){re.escape(private)}(?!\w)", text):
                raise ValueError("the cassette would contain a path or a name of this machine")
        return text

    @staticmethod
    def deserialize(text: str) -> Any:
        return yaml.safe_load(text)


def _clean_request(server: str) -> Callable[[Any], Any]:
    def clean(request: Any) -> Any:
        parts = urlsplit(request.uri)
        request.uri = urlunsplit((parts.scheme, f"127.0.0.1:{USUAL_PORT[server]}", parts.path, parts.query, ""))
        request.headers = {k.lower(): v for k, v in request.headers.items() if k.lower() in KEPT_REQUEST_HEADERS}
        return request

    return clean


def _clean_response(response: dict[str, Any]) -> dict[str, Any]:
    headers = {k.lower(): v for k, v in response["headers"].items() if k.lower() in KEPT_RESPONSE_HEADERS}
    body = response["body"]["string"].decode()
    status = response["status"]["code"]
    if status >= 400:
        # Servers quote keys back, whole, in part or hashed; the length stays.
        body = re.sub(r"sk-[\w.-]+|\b[0-9a-f]{64}\b", lambda found: "X" * len(found.group()), body)
    return {**response, "headers": headers, "body": {"string": body.encode()}}


@contextmanager
def recording(server: str, name: str) -> Iterator[None]:
    """Record everything inside as the cassette of that name, anew."""
    folder = HERE / server
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.unlink(missing_ok=True)
    recorder = vcr.VCR(
        record_mode=vcr.mode.ALL,
        before_record_request=_clean_request(server),
        before_record_response=_clean_response,
        decode_compressed_response=True,
    )
    recorder.register_serializer("readable", ReadableYaml)
    with recorder.use_cassette(str(path), serializer="readable"):
        yield


def _get(url: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def server_version(server: str, root: str) -> str:
    """What the running server says its version is."""
    if server.startswith("llama-server"):
        return str(_get(f"{root}/props")["build_info"])
    if server == "litellm":
        return str(_get(f"{root}/health/readiness")["litellm_version"])
    return str(_get(f"{root}/openapi.json")["info"]["version"])


def record(server: str, root: str, only: set[str], known_version: str | None) -> None:
    """Record the scenarios of one server, and who it was."""
    client = openai.OpenAI(base_url=f"{root}/v1", api_key=KEY, max_retries=0, default_headers=SENT_HEADERS)
    for name, play in SCENARIOS[server].items():
        if only and name not in only:
            continue
        with recording(server, name):
            play(client)
        print(f"{server}/{name}")
    described = {
        "server": server,
        "version": known_version or server_version(server, root),
        "recorded": datetime.now(timezone.utc).date().isoformat(),
        "recorder": {name: version(name) for name in ("openai", "anthropic", "vcrpy")},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, no GPU",
    }
    (HERE / server / "server.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Record the servers named on the command line and write the index and the bundle."""
    parser = argparse.ArgumentParser(description="Record cassettes from running servers.")
    for server in SCENARIOS:
        parser.add_argument(f"--{server}", metavar="URL", help=f"root URL of the running {server}")
    parser.add_argument("--only", action="append", default=[], help="record this scenario alone (may be repeated)")
    parser.add_argument(
        "--version", action="append", default=[], metavar="SERVER=TEXT", help="for a server that cannot tell its own"
    )
    arguments = vars(parser.parse_args())
    only = set(arguments.pop("only"))
    versions = dict(one.split("=", 1) for one in arguments.pop("version"))
    for server in SCENARIOS:
        root = arguments[server.replace("-", "_")]
        if root:
            record(server, root.rstrip("/"), only, versions.get(server))
    bundle.write()


if __name__ == "__main__":
    main()
