"""One logical call of an Anthropic client: what is its own about it, from the request to the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..context import current_context
from ..lifecycle import ModelCall
from ..usage import read_body
from ._anthropic_endpoints import classify, platform_of, request_body
from ._aws_events import AwsReader
from ._sdk_call import Call, ending_of, prepare_call

if TYPE_CHECKING:
    from ..context import CallContext
    from ..usage import StreamReader
    from ..vluna import Vluna
    from ._openai_endpoints import Endpoint

_ORIGIN: Final = "_vluna_origin"
_AWS: Final = "application/vnd.amazon.eventstream"


class AnthropicCall(Call):
    """A call of an Anthropic client under way.

    The SDK's middleware may ask the provider more than once inside it, on another model, and long after ``request`` has
    returned: a fallback that continues a stream. Each such request is a model call of its own, for who paid for the
    first; so the call travels along in the options, which the middleware hands on.
    """

    __slots__ = ("_has_middleware", "payer")

    sdk = "anthropic"

    def __init__(
        self, vluna: Vluna, bound: CallContext | None, model_call: ModelCall, url: str, *, has_middleware: bool
    ) -> None:
        super().__init__(vluna, bound, model_call, url)
        self._has_middleware = has_middleware
        self.payer = current_context() if bound is None else current_context().override(bound)

    def __deepcopy__(self, memo: dict[int, Any]) -> AnthropicCall:
        return self  # options may be copied deeply

    def asking(self, options: Any) -> Any:
        """The options with this call in them, where a middleware may hand them on; else the same object."""
        if not self._has_middleware:
            return options
        try:
            asked = options.model_copy()
            asked.__dict__[_ORIGIN] = self
            return asked
        except Exception:
            self.vluna.internal_error("anthropic.middleware")
            return options

    def again(self, options: Any) -> AnthropicCall:
        """The call that a middleware makes after this one was answered."""
        first = self.model_call
        body = request_body(options) or {}
        model = str(body.get("model") or first.model)
        again = ModelCall(first.kind, first.provider, model, body, first.stream)
        return AnthropicCall(self.vluna, self.payer, again, self.url, has_middleware=False)

    def _reader(self, response: Any) -> StreamReader | None:
        content_type = response.headers.get("content-type", "")
        return AwsReader(self.url) if content_type.startswith(_AWS) else None

    def _whole(self, response: Any) -> None:
        if self.operation is None:
            return
        facts = read_body(self.url, response.headers.get("content-type"), response.content)
        self.operation.finish(ending_of(facts, whole=facts.complete))


def origin_of(options: Any) -> AnthropicCall | None:
    """The call in whose options a middleware makes a request."""
    found = vars(options).get(_ORIGIN)
    return found if isinstance(found, AnthropicCall) else None


def prepare(vluna: Vluna, bound: CallContext | None, client: Any, options: Any, stream: bool) -> AnthropicCall | None:
    """What has to be done about this request; None where nothing has.

    Raises:
        ConfigurationError: the endpoint costs money, is not metered, and the setting ``on_unmetered`` is ``deny``.
    """

    def find() -> AnthropicCall | Endpoint:
        body = request_body(options)
        endpoint = classify(options.method, options.url, body)
        if endpoint.role != "metered":
            return endpoint
        body = body or {}
        model_call = ModelCall(
            kind=endpoint.kind,
            provider=platform_of(client, client.base_url.host),
            model=str(body.get("model") or "default"),
            body=body,
            stream=stream or body.get("stream") is True,
        )
        return AnthropicCall(
            vluna, bound, model_call, options.url, has_middleware=bool(getattr(client, "_middleware", ()))
        )

    return prepare_call(vluna, bound, "anthropic", find)
