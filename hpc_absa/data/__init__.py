"""Which sample comes when, where its pixels come from, and how they reach the model."""
