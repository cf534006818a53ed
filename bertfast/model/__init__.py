"""BERT itself: configuration, encoder, heads, packing, and checkpoints in Hugging Face's layout."""
