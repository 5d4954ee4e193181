"""Analyses of Mirzadeh et al. (2020): training regimes and forgetting."""
