"""Between text and tokens: tokenizer, incremental detokenizer, chat templates, stop strings."""
