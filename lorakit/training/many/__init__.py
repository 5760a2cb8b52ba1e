"""Several adapters over one frozen model, trained in one pass a step."""
