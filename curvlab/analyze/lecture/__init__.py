"""Analyses of Carta's lecture "Continual Learning: Regularization Priors"."""
