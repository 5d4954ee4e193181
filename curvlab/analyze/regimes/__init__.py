"""Mirzadeh et al. (2020), on training regimes and forgetting."""
