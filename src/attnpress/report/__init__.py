"""Tables and figures from records, without a model."""
