"""Gepperth and Wiech (2019), on the diagonal of the Fisher and MaSQ."""
