"""Binding to Transformers. Only this folder depends on its internals."""
