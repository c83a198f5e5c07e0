"""How a model is cut, and how the pieces talk."""
