"""Analyses of Shon et al. (2022): deep linear continual fine-tuning (DLCFT)."""
