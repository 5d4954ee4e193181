"""Analyses of Gepperth and Wiech (2019): the diagonal of the Fisher, and MaSQ."""
