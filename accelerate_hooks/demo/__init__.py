"""A small, really trained model, and what the policies make of it."""
