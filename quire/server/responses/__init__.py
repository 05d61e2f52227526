"""OpenAI's newer API: /v1/responses, without anything kept. ``endpoint`` has the routes, ``conversation`` and ``tools`` turn a request
into one of /v1/chat/completions, ``reply`` writes the answer."""
