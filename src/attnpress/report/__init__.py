"""From records to tables and figures; no model at hand."""
