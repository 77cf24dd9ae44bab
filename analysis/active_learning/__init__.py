"""Which sentences to label next: acquisition functions, word budgets (ner_active_learning.md sections 5 and 6)."""
