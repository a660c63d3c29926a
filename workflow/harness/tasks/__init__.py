"""lm-eval tasks of the llm-adapters protocol."""
