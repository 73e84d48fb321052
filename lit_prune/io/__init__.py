"""Files: Hugging Face folders, GGUF, Lightning checkpoints, models and tokenizers by source."""
