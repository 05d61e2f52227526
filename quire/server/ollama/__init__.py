"""Ollama's API, for clients that know no other: /api/chat, /api/generate, /api/embed and what they ask of models. ``endpoint`` has the
routes that run the model and ``models`` those that describe it, ``conversation`` turns a request into one of /v1/chat/completions,
``reply`` writes the answer."""
