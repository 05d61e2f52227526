"""The small model that ships with the package: this folder is a model folder (``quire.models.weights.resolve_model``)."""
