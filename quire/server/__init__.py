"""The HTTP server. Importing this package imports nothing else.

Reading order: ``launch`` and ``assembly`` (from a folder to a running server), ``app`` (routes), ``openai.completions`` (one endpoint
from body to bytes), ``calls.generation`` (tokens to text), ``engine.client`` and ``engine.journal`` (what is in flight),
``engine.supervisor`` (the way to the engine's process, and to the next one), ``engine.process`` and ``engine.loop`` (the other side of
``engine.messages``).

    http        what every call passes: the protocol and its limits, keys, ids, errors, streams of events
    calls       from the fields of a call to a generation, and from there to what its client reads; shared by all APIs
    openai, responses, anthropic    the APIs; a conversation goes one way, whichever it came by: the newer ones translate requests
                into those of ``openai.chat``, and write what comes back (``calls.turn``) in their own form
    engine      the engine as the front sees it, and its process
    batches     files of lines that survive everything
    metrics     what is counted, and who is told outside
    page        the live page

Who owns what: the engine's process owns the model and the blocks, and nothing that can't be rebuilt. Here, everything runs on the
event loop but the supervisor's two threads, which carry messages. ``calls.generation`` owns a call's requests, and ends them when it
is left. Errors of any kind become an answer in ``http.errors``, and nowhere else.
"""
