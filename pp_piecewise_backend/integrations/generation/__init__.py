"""Several prompts in flight over a pipeline of a Hugging Face decoder: ``integrations.huggingface.generate``."""
