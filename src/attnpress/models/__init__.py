"""Binding to Transformers: the only place that knows its internals."""
