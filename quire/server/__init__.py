"""The HTTP server. Importing this package imports nothing else.

Reading order: ``launch`` (from a folder to a running server), ``app`` (routes), ``completions`` (one endpoint from body to
bytes), ``generation`` (tokens to text), ``client`` and ``journal`` (what is in flight), ``supervisor`` (the way to the engine's
process, and to the next one), ``engine_process`` and ``engine_loop`` (the other side of ``messages``).

A conversation goes one way, whatever API it came by: ``responses`` and ``anthropic`` translate requests into those of ``chat``, and
write what comes back (``turn``) in their own form.

Who owns what: the engine's process owns the model and the blocks, and nothing that can't be rebuilt. Here, everything runs on the
event loop but the supervisor's two threads, which carry messages. ``generation`` owns a call's requests, and ends them when it is
left. Errors of any kind become an answer in ``errors``, and nowhere else.
"""
