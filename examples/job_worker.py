"""A worker of a queue that delivers at least once: a job that is run again is charged once.

The worker is a process of its own, as Celery's and RQ's are; it dies in the middle of a job, behind the model call and
before the acknowledgement, and the queue hands the job out again. Run it as it is, it needs no account, no key and no
network: the gate is the embedded one, and the provider replays recorded answers.

    pip install '.[demo]' && python examples/job_worker.py
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile

import openai

from vluna_llm import Vluna, call_context

MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")


def run_job(job: dict, dies: bool) -> None:
    """One job, in a worker process."""
    vluna = Vluna()  # in a real worker: made once, at import; it may be made before the fork
    client = vluna.wrap(openai.OpenAI())
    with call_context(principal_id=job["customer"], idempotency_key=job["id"], max_tokens=2_000) as task:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": job["question"]}])
        if dies:
            os._exit(9)  # the model has answered, the charge is in the journal, the job is not acknowledged
        vluna.flush(5)  # workers that end by os._exit run no exit handlers: deliver at the end of each job
        print(job["id"], "done:", task.settled_xusd, "XUSD", flush=True)


def work(jobs: list[dict]) -> None:
    """The queue: a job counts as done when its worker says so."""
    waiting = [(job, 1) for job in jobs]
    while waiting:
        job, attempt = waiting.pop(0)
        dies = job["id"] == "job-2" and attempt == 1
        worker = multiprocessing.get_context("spawn").Process(target=run_job, args=(job, dies))
        worker.start()
        worker.join()
        if worker.exitcode != 0:
            print(job["id"], "died, and is handed out again", flush=True)
            waiting.append((job, attempt + 1))


def main() -> None:
    """Three jobs of one customer; the second one's worker dies once."""
    from vluna_llm.sandbox import Sandbox
    from vluna_llm.sandbox.replay import ReplayUpstream

    with Sandbox() as gate, ReplayUpstream() as provider, tempfile.TemporaryDirectory() as outbox:
        os.environ.update(gate.env(), OPENAI_BASE_URL=provider.base_url, OPENAI_API_KEY="none", VLUNA_LLM_OUTBOX=outbox)
        question = "What is a lighthouse for?"
        work([{"id": f"job-{n}", "customer": "customer_ann", "question": question} for n in (1, 2, 3)])
        print(len(provider.served), "model calls,", len(gate.booked("customer_ann").entries), "charges for 3 jobs")


if __name__ == "__main__":
    main()
