"""A web application that bills each request to its customer: FastAPI, streaming answers, refusals as HTTP.

Run it as it is, it needs no account, no key and no network: the gate is the embedded one, and the provider replays
recorded answers. In production leave out `main`, set the four VLUNA_SERVICE_* variables and OPENAI_API_KEY, and start
``uvicorn web_app:make_app --factory``.

    pip install '.[demo]' fastapi && python examples/web_app.py
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import fastapi
import httpx
import openai
import uvicorn
from fastapi.responses import StreamingResponse

from vluna_llm import Vluna
from vluna_llm.integrations.asgi import VlunaMiddleware

MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")
CUSTOMERS = {"key-of-ann": "customer_ann", "key-of-bob": "customer_bob"}  # your authentication


def customer_of(scope: dict) -> dict | None:
    """Who pays for a request: what the authentication knows, never what the client says of itself."""
    key = dict(scope["headers"]).get(b"x-api-key", b"").decode()
    return {"principal_id": CUSTOMERS[key]} if key in CUSTOMERS else None


def make_app() -> fastapi.FastAPI:
    """The application."""
    vluna = Vluna()
    client = vluna.wrap(openai.AsyncOpenAI())

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await client.close()

    app = fastapi.FastAPI(lifespan=lifespan)
    app.add_middleware(VlunaMiddleware, identity=customer_of, vluna=vluna)

    @app.get("/ask")
    async def ask(request: fastapi.Request, question: str) -> dict:
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": question}])
        spent = request.state.vluna  # everything that this request has cost
        await spent.wait_async(5)
        return {"answer": answer.choices[0].message.content, "xusd": spent.settled_xusd}

    @app.get("/tell")
    async def tell(question: str) -> StreamingResponse:
        async def words() -> AsyncIterator[str]:  # runs when `tell` has returned; still billed to the same customer
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": question}], stream=True
            )
            async with stream:  # a client that leaves costs nothing: the answer is closed with it
                async for chunk in stream:
                    yield chunk.choices[0].delta.content or ""

        return StreamingResponse(words(), media_type="text/plain")

    return app


@contextmanager
def serving(app: fastapi.FastAPI) -> Iterator[str]:
    """The application on a real server, shut down in order at the end."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    """Two customers ask; one of them is broke."""
    from vluna_llm.sandbox import Sandbox
    from vluna_llm.sandbox.replay import ReplayUpstream

    with Sandbox() as gate, ReplayUpstream() as provider:
        os.environ.update(
            gate.env(), OPENAI_BASE_URL=provider.base_url, OPENAI_API_KEY="none", VLUNA_LLM_OUTBOX="memory"
        )
        gate.set_credit("customer_bob", 0)
        with serving(make_app()) as url:
            question = {"question": "What is a lighthouse for?"}
            ann, bob = {"x-api-key": "key-of-ann"}, {"x-api-key": "key-of-bob"}
            told = httpx.get(url + "/ask", params=question, headers=ann)
            print("ann asks:", told.status_code, told.json()["xusd"], "XUSD")
            told = httpx.get(url + "/tell", params=question, headers=ann)
            print("ann listens:", told.status_code, len(told.text), "characters")
            told = httpx.get(url + "/ask", params=question, headers=bob)
            print("bob asks:", told.status_code, told.json()["error"]["type"])
        print("the gate has booked", len(gate.booked("customer_ann").entries), "calls of ann,", end=" ")
        print(len(gate.booked("customer_bob").entries), "of bob")


if __name__ == "__main__":
    main()
