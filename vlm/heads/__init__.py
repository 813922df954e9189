"""Heads: what one does with a dual encoder's embeddings without training it further."""
