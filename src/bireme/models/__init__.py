"""Language models, one short file a family, built one stage at a time."""
