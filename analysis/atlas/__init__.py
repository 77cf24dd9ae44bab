"""The atlas: which neurons and experts of a language model serve which language (moe_split.md sections 4 and 5)."""
