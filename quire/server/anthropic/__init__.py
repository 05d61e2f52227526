"""Anthropic's API: /v1/messages and /v1/messages/count_tokens. ``endpoint`` has the routes, ``conversation`` and ``tools`` turn a
request into one of /v1/chat/completions, ``reply`` writes the answer."""
