"""What the server counts, and how it says it. Importing this package imports nothing else.

Reading order: ``histogram``, ``meter`` (requests, as the front sees them), ``totals`` (the engine's counters, over all engines that
there were), ``families`` (names, help texts, values), ``vllm`` (the same under vLLM's names), ``route`` (GET /metrics). Beside them,
who is told without asking (``observers``): a collector of traces (``tracing``), and routers, of what the prefix cache holds
(``kv_events``, ``kv_publisher``).

Nothing is written in a metrics library's format before somebody asks: a token costs the front one bisection and two additions.
"""
