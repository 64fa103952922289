"""What a bare HTTP request to a model provider is: the call that it makes, and the answer that stands for a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigurationError, VlunaError
from ..lifecycle import ModelCall
from ._answer import answer_to
from ._anthropic_call import AnthropicCall
from ._anthropic_call import prepare as prepare_anthropic
from ._openai_call import prepare as prepare_openai
from ._openai_endpoints import classify, path_of
from ._sdk_call import Call, prepare_call

if TYPE_CHECKING:
    from ..context import CallContext
    from ..vluna import Vluna

_ANTHROPIC: Final = re.compile(r"/(?:messages(?:/batches|/count_tokens)?|complete)\Z")
_NATIVE: Final = re.compile(
    r"/models/(?P<google>[^/:]+):(?:streamG|g)enerateContent\Z|/models/(?P<vertex_ai>[^/:]+):(?:streamR|r)awPredict\Z|"
    r"/model/(?P<bedrock>[^/]+)/(?:invoke|invoke-with-response-stream|converse|converse-stream)\Z|"
    r"(?P<cohere>/v[12]/chat)\Z|(?P<ollama>/api/(?:chat|generate))\Z"
)
"""APIs of providers' own that the readers know; the model stands in the path of the first three."""
_DEPLOYMENT: Final = re.compile(r"/deployments/([^/]+)/")
_MODEL_FIELD: Final = re.compile(rb'\bname="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')
_MAY_BE_FORM: Final = re.compile(r"/(?:audio/(?:transcriptions|translations)|images/(?:edits|variations))\Z")


class NativeCall(AnthropicCall):
    """A call in a provider's own API; its answer is read as Anthropic's is, also where AWS wraps it."""

    __slots__ = ()

    sdk = "httpx"


@dataclass(frozen=True)
class _Options:
    """The request, as the SDKs' integrations look at one."""

    method: str
    url: str
    json_data: object
    extra_json: object = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: object = None

    def model_copy(self) -> _Changed:
        return _Changed(self.json_data, self.extra_json)


@dataclass
class _Changed:
    json_data: object
    extra_json: object


@dataclass(frozen=True)
class _Origin:
    """The client, as the SDKs' integrations look at one."""

    base_url: Any
    _azure_deployment: str | None


def may_be_metered(request: Any) -> bool:
    """Whether this request's body is worth reading: uploads of files and the like are passed on unread."""
    path = request.url.path
    if "/responses/" in path:  # one in the background, whose usage a retrieve brings
        return True
    kind = request.headers.get("content-type", "")
    return request.method == "POST" and ("json" in kind or bool(_MAY_BE_FORM.search(path_of(path))))


@dataclass(frozen=True)
class Exchange:
    """One request that is metered.

    ``asked`` is the body to be sent in place of the request's own, where usage is asked for on the caller's behalf.
    """

    call: Call
    asked: bytes | None = None


def prepare(vluna: Vluna, bound: CallContext | None, request: Any) -> Exchange | None:
    """What has to be done about a request whose body has been read; None where nothing has.

    Raises:
        ConfigurationError: the endpoint costs money, is not metered, and the setting ``on_unmetered`` is ``deny``.
    """
    path = path_of(request.url.path)
    body = _body(request)
    options = _Options(request.method, path, body)
    stream = isinstance(body, dict) and body.get("stream") is True
    deployment = _DEPLOYMENT.search(path)
    origin = _Origin(request.url.copy_with(path="/", query=None), deployment.group(1) if deployment else None)
    native = _NATIVE.search(path)
    if native is not None and (native.lastgroup in ("google", "vertex_ai", "bedrock") or (body or {}).get("model")):
        call = prepare_call(vluna, bound, "httpx", lambda: _native(vluna, bound, native, path, body or {}))
        return None if call is None else Exchange(call)
    if _speaks_anthropic(request):
        message = prepare_anthropic(vluna, bound, origin, options, stream)
        return None if message is None else Exchange(message)
    chat = prepare_openai(vluna, bound, origin, options, stream, flavour="")
    if chat is None:
        return None
    asking = chat.asking(options)
    return Exchange(chat, None if asking is options else json.dumps(asking.json_data).encode())


def _native(vluna: Vluna, bound: CallContext | None, found: re.Match[str], path: str, body: dict[str, Any]) -> Call:
    kind = found.lastgroup or ""
    model = body.get("model") if kind in ("cohere", "ollama") else found.group(kind)
    streams = body.get("stream") is True or "stream" in path.rpartition("/")[2]
    model_call = ModelCall("chat", kind, str(model), body, streams)
    return NativeCall(vluna, bound, model_call, path, has_middleware=False)


def _body(request: Any) -> dict[str, Any] | None:
    content: bytes = request.content
    if _MAY_BE_FORM.search(path_of(request.url.path)):
        found = _MODEL_FIELD.search(content)
        return {"model": found.group(1).decode("utf-8", "replace")} if found else None
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _speaks_anthropic(request: Any) -> bool:
    path = path_of(request.url.path)
    if _ANTHROPIC.search(path):
        return True
    return "anthropic-version" in request.headers and classify(request.method, path).role != "metered"


class RefusedOption(Exception):
    """An answer of the provider that may mean that it does not know what was asked for on the caller's behalf."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status_code = status


def refusal(error: VlunaError, request: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body that stand for a refusal, in the shape of the provider that was not asked.

    Whoever put the transport there reads it, and nobody else: the message is the error's own, and a setting that is
    wrong is the request's fault (400), not a client's that may not.
    """
    answer, message = answer_to(error), str(error)
    if isinstance(error, ConfigurationError):
        answer = replace(answer, status=400, kind="invalid_request_error")
    headers = {"x-should-retry": "false", **answer.headers()}
    if _speaks_anthropic(request):
        return answer.status, headers, {"type": "error", "error": {"type": answer.kind, "message": message}}
    body = {"message": message, "type": answer.kind, "param": None, "code": answer.code}
    return answer.status, headers, {"error": body}
