"""What a corrector does to a model: spectral norms, error growth, residuals, and what to do."""
