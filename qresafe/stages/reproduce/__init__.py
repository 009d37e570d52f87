"""The paper's tables, arm by arm: what each asks, what the paper says, and how ours is measured."""
