"""Records of what was measured, as plain JSON: reports and tests read them with no model at hand."""
