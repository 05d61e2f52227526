"""OpenAI's older APIs, and what vLLM's users find beside them: completions, chats, embeddings, tokens."""
