"""Records of measurements as plain JSON. Reports and tests read them without a model."""
