"""Text to token ids and back: tokenizer, chat templates, detokenizer, sentences and documents to learn from."""
