"""The HTTP server. Importing this package imports nothing else.

Reading order: ``launch`` (from a folder to a running server), ``app`` (routes), ``completions`` (one endpoint from body to
bytes), ``generation`` (tokens to text), ``client`` and ``engine_loop`` (the two sides of ``messages``).

Who owns what: ``engine_loop``'s thread owns the engine; everything else runs on the event loop. ``generation`` owns a call's
requests, and ends them when it is left. Errors of any kind become an answer in ``errors``, and nowhere else.
"""
