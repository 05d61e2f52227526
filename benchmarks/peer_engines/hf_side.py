"""transformers: runs in the Python that has it, and imports nothing of Quire.

Reads one JSON object a line and answers each with one line: first what to load, then what to run.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any

Request = tuple[list[int], int]


def static(torch: Any, model: Any, size: int, requests: list[Request]) -> list[list[int]]:
    """Batches of ``size``, padded on the left, each run to its longest output; sorted by output length, so that little is wasted."""
    order = sorted(range(len(requests)), key=lambda i: requests[i][1])
    outputs: list[list[int]] = [[] for _ in requests]
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        width, length = max(len(requests[i][0]) for i in batch), max(requests[i][1] for i in batch)
        ids = torch.tensor([[0] * (width - len(requests[i][0])) + requests[i][0] for i in batch])
        mask = torch.tensor([[0] * (width - len(requests[i][0])) + [1] * len(requests[i][0]) for i in batch])
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0)
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            outputs[i] = row[: requests[i][1]]
    return outputs


class Continuous:
    """The manager of continuous batching, kept over all runs."""

    def __init__(self, transformers: Any, model: Any, options: dict[str, Any]) -> None:
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        config = transformers.ContinuousBatchingConfig(**options)
        self._manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        self._manager.start()
        self._runs = 0

    def run(self, requests: list[Request]) -> list[list[int]]:
        self._runs += 1
        for i, (prompt, length) in enumerate(requests):
            self._manager.add_request(prompt, f"{self._runs}/{i}", max_new_tokens=length, eos_token_id=-1)
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(requests):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise SystemExit(f"continuous batching failed: {result.error}")
                outputs[result.request_id] = list(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise SystemExit("the thread of continuous batching has ended")
        return [outputs[f"{self._runs}/{i}"] for i in range(len(requests))]


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with the answers

    import torch
    import transformers

    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setup["model"], dtype=getattr(torch, setup["dtype"]), attn_implementation=setup["attention"]
    )
    model.eval()
    model.generation_config.eos_token_id = None  # lengths are forced
    continuous = Continuous(transformers, model, setup["continuous"]) if setup["continuous"] is not None else None
    answer: dict[str, Any] = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    while True:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the manager's thread may still run
        requests = [(prompt, length) for prompt, length in json.loads(line)]
        start = perf_counter()
        outputs = continuous.run(requests) if continuous is not None else static(torch, model, setup["batch"], requests)
        answer = {"seconds": perf_counter() - start, "outputs": outputs}


if __name__ == "__main__":
    main()
