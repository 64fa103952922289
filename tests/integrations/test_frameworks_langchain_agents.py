"""LangChain's agents and LangGraph: each call of a model, and each billable tool, is settled once."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from conftest import Bill
from langchain_stage import HttpModel, Script, openai_model, run
from provider import Provider

pytest.importorskip("langchain.agents", reason="LangChain's agents are not installed: pip install langchain")

from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt

from vluna_llm import Vluna, call_context
from vluna_llm.errors import GateDenied
from vluna_llm.integrations.langchain import BillableTool, VlunaMiddleware, may_retry, wrap_model
from vluna_llm.sandbox import Sandbox

ONE_CALL = Script.INPUT + Script.OUTPUT
ASK = {"messages": [{"role": "user", "content": "When does the tide turn?"}]}

needs_task_contexts = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="before Python 3.11 LangGraph's config does not follow into its tasks"
)


@pytest.fixture
def script() -> Iterator[Script]:
    """An upstream whose model calls each tool once."""
    upstream = Script()
    yield upstream
    upstream.close()


@tool
def search(what: str) -> str:
    """Search the web."""
    return f"results for {what}"


@tool
def weigh(what: str) -> str:
    """Weigh the results."""
    return "heavy"


def thread(name: str, principal_id: str | None = None) -> Any:
    """A config with a thread, and a customer."""
    config: dict[str, Any] = {"configurable": {"thread_id": name}}
    return config | ({"metadata": {"vluna": {"principal_id": principal_id}}} if principal_id else {})


def entries(gate: Sandbox, vluna: Vluna, customer: str) -> list[tuple[str, int, str | None]]:
    """What is in the gate's books: feature, quantity and the node that asked."""
    assert vluna.flush(10)
    booked = gate.booked(customer).entries
    assert {entry.status for entry in booked} <= {"applied"}
    assert {lease.state for lease in gate.leases(customer)} <= {"closed", "canceled"}
    return sorted((entry.feature, entry.quantity, entry.labels.get("node")) for entry in booked)


async def _acollect(items: Any) -> list[Any]:
    return [item async for item in items]


def work(graph: Any, how: str, given: Any, config: Any) -> None:
    """One run of a graph."""
    if how == "invoke":
        graph.invoke(given, config)
    elif how == "ainvoke":
        run(graph.ainvoke(given, config))
    elif how == "stream":
        assert len(list(graph.stream(given, config, stream_mode="messages"))) > 1
    elif how == "astream":
        assert len(run(_acollect(graph.astream(given, config, stream_mode=["messages", "updates"])))) > 1
    else:
        assert len(run(_acollect(graph.astream_events(given, config, version="v2")))) > 1


def ways(*names: str) -> Any:
    """A parameter for each, the async ones where configs follow into tasks."""
    return pytest.mark.parametrize(
        "how", [pytest.param(name, marks=needs_task_contexts if name[0] == "a" else ()) for name in names]
    )


WAYS = ways("invoke", "ainvoke", "stream", "astream", "astream_events")


# -- agents ------------------------------------------------------------------------------------------------------------


@WAYS
def test_an_agent_is_charged_for_each_call(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """Three model calls and the one tool that costs money, each with its node; whole and streamed."""
    tools = {"search": "tools.search"}
    agent = create_agent(
        wrap_model(openai_model(script.base_url), vluna),
        [search, weigh],
        middleware=[VlunaMiddleware(vluna, tools=tools)],
        checkpointer=InMemorySaver(),
    )
    work(agent, how, ASK, thread("t", customer))
    assert entries(shared_gate, vluna, customer) == [
        *[("openai.gpt-4o", ONE_CALL, "model")] * 3,
        ("tools.search", 1, "tools"),
    ]
    assert len(script.asked) == 3


@WAYS
def test_the_middleware_alone_meters_the_model(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """A bare model and a tool, bound by the middleware, whatever the config says."""
    middleware = [VlunaMiddleware(vluna, tools={"search": "tools.search"}, principal_id=customer)]
    agent = create_agent(openai_model(script.base_url), [search], middleware=middleware)
    work(agent, how, ASK, thread("t", f"{customer}_config"))
    assert entries(shared_gate, vluna, customer) == [
        *[("openai.gpt-4o", ONE_CALL, "model")] * 2,
        ("tools.search", 1, "tools"),
    ]
    assert entries(shared_gate, vluna, f"{customer}_config") == []


def test_a_model_that_other_middleware_brings_in_is_metered(
    script: Script, provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """The fallback of an agent; the call that failed is given back."""
    provider.behaviour = "down"
    middleware = [ModelFallbackMiddleware(openai_model(script.base_url, "gpt-4o-mini")), VlunaMiddleware(vluna)]
    agent = create_agent(openai_model(provider.base_url), [search], middleware=middleware)
    agent.invoke(ASK, thread("t", customer))
    assert entries(shared_gate, vluna, customer) == [("openai.gpt-4o-mini", ONE_CALL, "model")] * 2
    assert sorted(lease.state for lease in shared_gate.leases(customer)) == ["canceled"] * 2 + ["closed"] * 2


@ways("invoke", "ainvoke")
def test_a_tool_that_fails_is_not_charged(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """Its exception is the caller's; its lease is given back, and the model call before it stays charged."""

    @tool
    def broken(what: str) -> str:
        """Break."""
        raise ZeroDivisionError

    middleware = [VlunaMiddleware(vluna, tools={"broken": BillableTool("tools.broken", estimate=3)})]
    agent = create_agent(wrap_model(openai_model(script.base_url), vluna), [broken], middleware=middleware)
    with pytest.raises(ZeroDivisionError):
        work(agent, how, ASK, thread("t", customer))
    assert entries(shared_gate, vluna, customer) == [("openai.gpt-4o", ONE_CALL, "model")]
    assert sorted(lease.state for lease in shared_gate.leases(customer)) == ["canceled", "closed"]


@ways("invoke", "ainvoke")
def test_a_tool_that_answers_with_an_error_is_not_charged(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """The agent goes on with the error."""

    @tool
    def picky(what: str) -> str:
        """Refuse."""
        raise ToolException("not this")

    picky.handle_tool_error = True
    middleware = [VlunaMiddleware(vluna, tools={"picky": "tools.picky"})]
    agent = create_agent(wrap_model(openai_model(script.base_url), vluna), [picky], middleware=middleware)
    work(agent, how, ASK, thread("t", customer))
    assert script.asked[-1]["messages"][-1]["content"] == "not this"
    assert entries(shared_gate, vluna, customer) == [("openai.gpt-4o", ONE_CALL, "model")] * 2


@pytest.mark.parametrize("how", ["ainvoke", "astream"])
def test_the_context_follows_into_an_agent(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """Without a word in the config; on Python 3.10 as well, but for the nodes' names."""
    middleware = [VlunaMiddleware(vluna, tools={"search": "tools.search"})]
    agent = create_agent(wrap_model(openai_model(script.base_url), vluna), [search], middleware=middleware)
    with call_context(principal_id=customer):
        work(agent, how, ASK, {})
    assert len(entries(shared_gate, vluna, customer)) == 3


@ways("invoke", "ainvoke")
def test_a_tool_says_how_much_it_was(
    how: str, script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """By a function of its result."""
    billable = BillableTool("tools.search", estimate=20, quantity=lambda message: len(message.content))
    middleware = [VlunaMiddleware(vluna, tools={"search": billable})]
    agent = create_agent(wrap_model(openai_model(script.base_url), vluna), [search], middleware=middleware)
    work(agent, how, ASK, thread("t", customer))
    assert ("tools.search", len("results for tides"), "tools") in entries(shared_gate, vluna, customer)


@ways("invoke", "ainvoke", "stream", "astream")
def test_a_tool_that_the_gate_refuses_is_not_run(how: str, script: Script, make_vluna: Any) -> None:
    """`GateDenied` comes out of the agent as it is."""
    ran: list[str] = []

    @tool
    def dear(what: str) -> str:
        """Cost a lot."""
        ran.append(what)
        return "done"

    with Sandbox() as gate:
        gate.customer("cust", deny=("tools.dear",))
        vluna = make_vluna(gate)
        middleware = [VlunaMiddleware(vluna, tools={"dear": "tools.dear"})]
        agent = create_agent(wrap_model(openai_model(script.base_url), vluna), [dear], middleware=middleware)
        with pytest.raises(GateDenied):
            work(agent, how, ASK, thread("t", "cust"))
        assert entries(gate, vluna, "cust") == [("openai.gpt-4o", ONE_CALL, "model")]
        vluna.close()
    assert ran == []


@WAYS
def test_a_refusal_comes_out_of_an_agent(how: str, script: Script, make_vluna: Any) -> None:
    """As our exception, in every way to run it; with `may_retry` the gate is asked once."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        retry = ModelRetryMiddleware(max_retries=3, retry_on=may_retry, on_failure="error", initial_delay=0.0)
        agent = create_agent(
            wrap_model(openai_model(script.base_url), vluna), [search], middleware=[retry, VlunaMiddleware(vluna)]
        )
        with pytest.raises(GateDenied):
            work(agent, how, ASK, thread("t", "broke"))
        assert len([seen for seen in gate.requests if seen.path.endswith("/authorize")]) == 1
        vluna.close()
    assert script.asked == []


@needs_task_contexts
def test_an_agent_stream_that_is_left_is_cancelled(
    provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """The consumer leaves in the middle of the model's words; LangGraph cancels its task."""
    provider.behaviour = "hang"
    agent = create_agent(wrap_model(openai_model(provider.base_url), vluna), [])

    async def main() -> None:
        parts = agent.astream(ASK, thread("t", customer), stream_mode="messages")
        await parts.__anext__()
        await parts.aclose()

    run(main())
    assert entries(shared_gate, vluna, customer) == []
    assert [lease.state for lease in shared_gate.leases(customer)] == ["canceled"]


# -- interrupt and resume ----------------------------------------------------------------------------------------------


class State(TypedDict, total=False):
    """What the graphs of these tests hand on."""

    said: Annotated[list[str], operator.add]


def asking_twice(model: Any) -> Any:
    """draft -> review, which asks the model, waits for a person, and asks again."""

    def draft(state: State) -> State:
        return {"said": [model.invoke("draft").content]}

    def review(state: State) -> State:
        before = model.invoke("review").content
        answer = interrupt("fine?")
        return {"said": [before, model.invoke(f"final {answer}").content]}

    graph = StateGraph(State)
    graph.add_node("draft", draft)
    graph.add_node("review", review)
    graph.add_edge(START, "draft")
    graph.add_edge("draft", "review")
    graph.add_edge("review", END)
    return graph.compile(checkpointer=InMemorySaver())


@pytest.fixture(params=["client", "messages"])
def model(request: pytest.FixtureRequest, provider: Provider, vluna: Vluna) -> Any:
    """A metered model of each layer."""
    kinds = {"client": openai_model, "messages": lambda url: HttpModel(base_url=url)}
    return wrap_model(kinds[request.param](provider.base_url), vluna)


def prompts(provider: Provider) -> list[str]:
    """What the provider was really asked."""
    return [seen.body["messages"][0]["content"] for seen in provider.posts()]


def test_a_resume_charges_what_is_really_asked_again(
    model: Any, provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """LangGraph runs the interrupted node again from its start: that call is made twice, and charged twice; the node
    that was done is not run again."""
    graph = asking_twice(model)
    assert "__interrupt__" in graph.invoke({"said": []}, thread("t", customer))
    assert [node for _, _, node in entries(shared_gate, vluna, customer)] == ["draft", "review"]
    graph.invoke(Command(resume="yes"), thread("t", customer))
    assert prompts(provider) == ["draft", "review", "review", "final yes"]
    assert [node for _, _, node in entries(shared_gate, vluna, customer)] == ["draft", "review", "review", "review"]


def test_a_resume_of_a_job_charges_each_call_once(
    model: Any, provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """With one ``idempotency_key`` for both runs the repeated call is known, and its second answer is free."""
    graph = asking_twice(model)
    for given in ({"said": []}, Command(resume="yes")):
        with call_context(principal_id=customer, idempotency_key=f"job-{customer}"):
            graph.invoke(given, thread("t"))
        assert vluna.flush(10)
    assert prompts(provider) == ["draft", "review", "review", "final yes"]
    assert len(shared_gate.booked(customer).entries) == 3


def test_a_billable_tool_that_is_interrupted_is_charged_once(
    script: Script, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """Nothing when it waits for a person, once when it is done; the model calls before are not made again."""

    @tool
    def buy(what: str) -> str:
        """Buy something, if a person agrees."""
        return f"bought {what}: {interrupt('buy?')}"

    agent = create_agent(
        wrap_model(openai_model(script.base_url), vluna),
        [buy],
        middleware=[VlunaMiddleware(vluna, tools={"buy": "tools.buy"})],
        checkpointer=InMemorySaver(),
    )
    config = thread("t", customer)
    agent.invoke(ASK, config)
    assert entries(shared_gate, vluna, customer) == [("openai.gpt-4o", ONE_CALL, "model")]
    agent.invoke(Command(resume="yes"), config)
    assert entries(shared_gate, vluna, customer) == [
        *[("openai.gpt-4o", ONE_CALL, "model")] * 2,
        ("tools.buy", 1, "tools"),
    ]
    assert len(script.asked) == 2


def test_a_failed_run_resumes_where_it_stopped(
    model: Any, provider: Provider, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """The node that was done before the failure is neither run nor charged again."""
    seen: list[str] = []

    def first(state: State) -> State:
        return {"said": [model.invoke("first").content]}

    def second(state: State) -> State:
        seen.append("second")
        if len(seen) == 1:
            raise ConnectionError
        return {"said": [model.invoke("second").content]}

    graph = StateGraph(State)
    graph.add_node("first", first)
    graph.add_node("second", second)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    compiled = graph.compile(checkpointer=InMemorySaver())
    with pytest.raises(ConnectionError):
        compiled.invoke({"said": []}, thread("t", customer))
    compiled.invoke(None, thread("t", customer))
    assert prompts(provider) == ["first", "second"]
    assert [node for _, _, node in entries(shared_gate, vluna, customer)] == ["first", "second"]


# -- graphs ------------------------------------------------------------------------------------------------------------


@ways("invoke", "ainvoke")
def test_branches_and_subgraphs_keep_their_customers(
    how: str, model: Any, vluna: Vluna, customer: str, shared_gate: Sandbox
) -> None:
    """Two graphs at once of two customers, each with parallel branches and a subgraph."""

    def node(name: str) -> Any:
        def ask(state: State) -> State:
            return {"said": [model.invoke(name).content]}

        async def aask(state: State) -> State:
            return {"said": [(await model.ainvoke(name)).content]}

        return ask if how == "invoke" else aask

    inner = StateGraph(State)
    inner.add_node("deep", node("deep"))
    inner.add_edge(START, "deep")
    graph = StateGraph(State)
    for name in ("left", "right"):
        graph.add_node(name, node(name))
        graph.add_edge(START, name)
    graph.add_node("sub", inner.compile())
    graph.add_edge(["left", "right"], "sub")
    compiled = graph.compile(checkpointer=InMemorySaver())
    configs = [thread(name, f"{customer}_{name}") for name in ("a", "b")]
    given: list[State] = [{"said": []}, {"said": []}]
    if how == "invoke":
        compiled.batch(given, configs)
    else:
        run(compiled.abatch(given, configs))
    for name in ("a", "b"):
        nodes = [node for _, _, node in entries(shared_gate, vluna, f"{customer}_{name}")]
        assert sorted(nodes) == ["deep", "left", "right"]


def test_one_branch_that_is_refused(provider: Provider, make_vluna: Any) -> None:
    """`GateDenied` ends the graph; the other branch ran, and is charged."""
    with Sandbox() as gate:
        gate.customer("cust", deny=("openai.gpt-4o",))
        vluna = make_vluna(gate)
        graph = StateGraph(State)
        for name in ("gpt-4o", "gpt-4o-mini"):
            model = wrap_model(openai_model(provider.base_url, name), vluna)
            graph.add_node(name, lambda state, model=model: {"said": [model.invoke("hi").content]})
            graph.add_edge(START, name)
        with pytest.raises(GateDenied):
            graph.compile().invoke({"said": []}, thread("t", "cust"))
        assert entries(gate, vluna, "cust") == [("openai.gpt-4o-mini", 120, "gpt-4o-mini")]
        vluna.close()


def test_a_node_is_not_retried_after_a_refusal(provider: Provider, make_vluna: Any) -> None:
    """``RetryPolicy(retry_on=may_retry)``."""
    with Sandbox() as gate:
        gate.set_credit("broke", 0)
        vluna = make_vluna(gate)
        model = wrap_model(openai_model(provider.base_url), vluna)
        graph = StateGraph(State)
        graph.add_node(
            "ask",
            lambda state: {"said": [model.invoke("hi").content]},
            retry_policy=RetryPolicy(max_attempts=4, initial_interval=0.01, retry_on=may_retry),
        )
        graph.add_edge(START, "ask")
        with pytest.raises(GateDenied):
            graph.compile().invoke({"said": []}, thread("t", "broke"))
        assert len([seen for seen in gate.requests if seen.path.endswith("/authorize")]) == 1
        vluna.close()


@pytest.mark.filterwarnings("ignore:create_react_agent")
def test_the_older_agent_is_charged_for_each_call(script: Script, vluna: Vluna, billed: Any) -> None:
    """``langgraph.prebuilt.create_react_agent``, with the surrounding context."""
    from langgraph.prebuilt import create_react_agent

    agent = create_react_agent(wrap_model(openai_model(script.base_url), vluna), [search])
    bill: Bill = billed(vluna, lambda: agent.invoke(ASK))
    entries_of = bill.gate.booked(bill.principal_id).entries
    assert [(entry.quantity, entry.labels["node"]) for entry in entries_of] == [(ONE_CALL, "agent")] * 2
